"""publish: the quantized checkpoint, its card and its record to a folder, to the Hub, to a URL.

What is published: every file of the compress artifact's `model/`, the card as `README.md` with
`.eval_results/`, and below `quantize/` the card's `record.json`, its `plots/` and `card.md.j2`, the
`recipe.yaml`, `provenance.json` (what it was made from), `model.sig` where the recipe signs, and
`manifest.json`, which lists all the others. An adapter that is kept apart lies below `adapter/`.
Nothing names a path of this machine.

Writes `receipt.json`::

    {"targets": [{"kind": "folder", "path", "files", "bytes", "changed"},
                 {"kind": "hub", "repo", "branch", "commit", "url", "files", "bytes", "changed"},
                 {"kind": "url", "url", "files", "bytes", "changed"}]}

A Hub target has `pull_request` (its address), `tag` and `collection` where the recipe asks for
them. `changed` is False where the target held exactly these files already. Beside it lie
`published.json` (the listing), `recipe.yaml`, `provenance.json` and `model.sig` as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantize.folder_target import publish_folder
from quantize.keys import digest, file_sha256
from quantize.listing import (
    LISTING,
    SIGNATURE,
    damage,
    not_as_made,
    parse_listing,
    refuse_hidden,
    write_listing,
)
from quantize.protocol import write_atomic, write_json
from quantize.provenance import RECIPE, STATEMENT, statement
from quantize.report.redact import base_name, redact
from quantize.stages.card import recipe_values
from quantize.store import VERIFY_ON_READ_BYTES, FileEntry

if TYPE_CHECKING:
    from quantize.recipe import Hub, Recipe, Sign
    from quantize.stages.base import Resolved, StageContext
    from quantize.store import Artifact

VERSION = 2

RECIPE_HEAD = "# The recipe of this checkpoint; local inputs are given by their names alone.\n"
LOCAL = {
    "model": ("model", "source"),
    "adapter": ("model", "adapter"),
    "calibration": ("calibration", "source"),
    "suite": ("evaluate", "suite"),
}
"""Where the recipe names the inputs that may be local, by their names in `Resolved.paths`."""


@dataclass(frozen=True)
class Files:
    """What is published, and where its bytes are, by published name."""

    entries: tuple[FileEntry, ...]
    paths: dict[str, Path]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.entries)


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: files are copied and sent by this process."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The targets; what is published follows from the inputs."""
    publish = resolved.recipe.publish
    inputs: dict[str, Any] = {"folder": publish.folder}
    if publish.hub is not None:
        from quantize.hub.client import endpoint

        inputs["hub"] = publish.hub.model_dump(mode="json") | {"endpoint": endpoint()}
    if publish.url is not None:
        from quantize.bucket.client import endpoint as s3_endpoint

        inputs["url"] = {"url": publish.url, "endpoint": s3_endpoint(publish.url)}
    if publish.sign is not None:
        inputs["sign"] = resolved.digests.get("sign")  # None: the key cannot be read here
    return inputs


def stale(resolved: Resolved, entry_id: str, artifact: Artifact) -> str | None:
    """Why the published folder must be looked at again: not there, or not what was published.

    Contents are compared up to 1 GiB in all, sizes always. The Hub and URLs are not asked: a
    finished run needs no network.
    """
    folder = resolved.recipe.publish.folder
    if folder is None:
        return None
    target = _folder(resolved.recipe)
    text = artifact.file("published.json").read_text(encoding="utf-8")
    if not target.is_dir():
        return f"{folder} is not there any more"
    listing = target / LISTING
    if not listing.is_file() or listing.read_bytes() != text.encode():
        return f"{folder} holds another publish"
    files = parse_listing(text, "published.json")
    small = sum(entry.bytes for entry in files.values()) <= VERIFY_ON_READ_BYTES
    found = damage(target, files, hash_files=small)
    return f"{folder} was changed: {found[0]}" if found else None


def run(context: StageContext) -> None:
    """Publish to every target of the recipe, write the receipt."""
    publish = context.recipe.publish
    files = collect(context)
    targets = []
    if publish.folder is not None:
        targets.append(_to_folder(context, files))
    if publish.hub is not None:
        targets.append(_to_hub(context, files, publish.hub))
    if publish.url is not None:
        targets.append(_to_url(context, files, publish.url))
    write_json(context.files / "receipt.json", {"targets": targets})


def collect(context: StageContext) -> Files:
    """The files to publish; writes recipe, statement, signature and listing into the artifact."""
    compress, card = context.inputs["compress"], context.inputs["card"]
    entries: list[FileEntry] = []
    paths: dict[str, Path] = {}

    def add(name: str, entry: FileEntry, path: Path) -> None:
        refuse_hidden(name)
        if path.is_symlink():
            raise not_as_made(path, "is a symlink")
        entries.append(FileEntry(name, entry.bytes, entry.sha256))
        paths[name] = path

    for entry in compress.manifest.files:
        name = entry.name.removeprefix("model/")
        if name != entry.name and name != "README.md":  # the source's card is not this model's
            add(name, entry, compress.path / entry.name)
    if "adapter" in context.inputs:
        adapter = context.inputs["adapter"]
        for entry in adapter.manifest.files:
            if entry.name.startswith("adapter/"):
                add(entry.name, entry, adapter.file(entry.name))
    for entry in card.manifest.files:
        add(published_name(entry.name), entry, card.file(entry.name))
    record = card.json("record.json")
    recipe = context.files / "recipe.yaml"
    write_atomic(recipe, recipe_text(context.resolved, record["recipe"]))
    add(RECIPE, _entry(recipe), recipe)
    provenance = context.files / "provenance.json"
    values = published_recipe(context.resolved, record["recipe"])
    write_json(provenance, statement(record, values, entries))
    add(STATEMENT, _entry(provenance), provenance)
    if context.recipe.publish.sign is not None:
        signature = _sign(context, context.recipe.publish.sign, entries)
        add(SIGNATURE, _entry(signature), signature)
    listing = context.files / "published.json"
    add(LISTING, write_listing(listing, entries), listing)
    return Files(tuple(entries), paths)


def published_name(name: str) -> str:
    """Where a file of the card artifact goes; the Hub reads the README and `.eval_results/`."""
    if name == "README.md":
        return name
    return f".{name}" if name.startswith("eval_results/") else f"quantize/{name}"


def recipe_text(resolved: Resolved, values: dict[str, Any]) -> str:
    """:func:`published_recipe` as YAML."""
    values = published_recipe(resolved, values)
    return RECIPE_HEAD + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def published_recipe(resolved: Resolved, values: dict[str, Any]) -> dict[str, Any]:
    """The recipe as the record has it, local inputs by their base names."""
    values = {key: dict(item) if isinstance(item, dict) else item for key, item in values.items()}
    for name, (block, key) in LOCAL.items():
        if name in resolved.paths and key in values.get(block, {}):
            values[block][key] = base_name(values[block][key])
    return values


def _sign(context: StageContext, sign: Sign, entries: list[FileEntry]) -> Path:
    """The signature of `entries`: an earlier one of the same files, or a new one.

    It is kept in the scratch folder, too: a run that is killed before its receipt is written
    signs nothing twice, and so sends nothing twice.
    """
    from quantize.signing import write_signature

    target, kept = context.files / "model.sig", context.work / "model.sig"
    digests = {entry.name: entry.sha256 for entry in entries}
    write_signature(sign, context.recipe.name, digests, target, _earlier_signatures(context))
    write_atomic(kept, target.read_text(encoding="utf-8"))
    return target


def _earlier_signatures(context: StageContext) -> Iterator[Path]:
    """Where a signature of the same files may be: nearest first, the Hub last."""
    yield context.work / "model.sig"
    yield context.store.path("publish", context.entry.key or "") / "model.sig"
    publish = context.recipe.publish
    if publish.folder is not None:
        yield _folder(context.recipe) / SIGNATURE
    if publish.hub is not None:
        from quantize.hub.client import access_from_environment
        from quantize.hub.repository import download_file

        access = access_from_environment()
        found = context.work / "on-the-hub"
        if download_file(access, publish.hub.repo, publish.hub.branch, SIGNATURE, found):
            yield found / SIGNATURE


def recipe_as_published(resolved: Resolved) -> str:
    """The text of `quantize/recipe.yaml`, before there is a card's record."""
    values: dict[str, Any] = redact(recipe_values(resolved.recipe))
    return recipe_text(resolved, values)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, file_sha256(path))


def _folder(recipe: Recipe) -> Path:
    """The folder target; relative to the working directory, links resolved."""
    assert recipe.publish.folder is not None
    return Path(recipe.publish.folder).expanduser().resolve()


def _to_folder(context: StageContext, files: Files) -> dict[str, Any]:
    target = _folder(context.recipe)
    lock = context.store.root / ".locks" / f"folder-{digest(str(target))[:16]}.lock"
    copied = publish_folder(
        target, files.entries, files.paths, lock, _progress(context, f"copying to {target.name}")
    )
    if copied.aside is not None:
        context.notes.append(f"{target} had been changed; the changed one is now {copied.aside}")
        context.runner.progress.note(context.notes[-1])
    return {
        "kind": "folder",
        "path": str(target),
        "files": len(files.entries),
        "bytes": files.bytes,
        "changed": copied.changed,
    }


def _to_hub(context: StageContext, files: Files, hub: Hub) -> dict[str, Any]:
    import huggingface_hub

    from quantize.hub.client import access_from_environment
    from quantize.hub.preflight import target_of
    from quantize.hub.push import push
    from quantize.hub.repository import require_write

    access = access_from_environment()
    require_write(access, hub.repo, pull_request=hub.pull_request)
    pushed = push(
        access,
        target_of(access, context.resolved, hub),
        files.entries,
        files.paths,
        f"Publish {context.recipe.name}",
        _progress(context, f"uploading to {hub.repo}"),
    )
    context.versions["huggingface_hub"] = huggingface_hub.__version__
    for note in pushed.notes:
        context.notes.append(note)
        context.runner.progress.note(note)
    asked = {"pull_request": pushed.pull_request, "tag": hub.tag, "collection": hub.collection}
    return {
        "kind": "hub",
        "repo": hub.repo,
        "branch": hub.branch,
        "commit": pushed.commit,
        "url": pushed.pull_request or pushed.url,
        "files": len(files.entries),
        "bytes": files.bytes,
        "changed": pushed.changed,
        **{key: value for key, value in asked.items() if value is not None},
    }


def _to_url(context: StageContext, files: Files, url: str) -> dict[str, Any]:
    import fsspec

    from quantize.bucket.client import endpoint, open_place
    from quantize.bucket.target import publish_url

    where = digest([url, endpoint(url)])[:16]
    changed = publish_url(
        open_place(url),
        files.entries,
        files.paths,
        context.store.root / ".locks" / f"url-{where}.lock",
        _progress(context, f"sending to {url}"),
    )
    context.versions["fsspec"] = fsspec.__version__
    return {
        "kind": "url",
        "url": url,
        "files": len(files.entries),
        "bytes": files.bytes,
        "changed": changed,
    }


def _progress(context: StageContext, what: str) -> Callable[[int, int], None]:
    step = context.runner.progress.step
    return lambda done, total: step(what, round(done / 1e6, 1), round(total / 1e6, 1), "MB")
