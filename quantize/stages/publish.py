"""publish: the quantized checkpoint, its card and its record to a folder, to the Hub, to a URL.

What is published is said in :mod:`quantize.publication`.

Writes `receipt.json`::

    {"targets": [{"kind": "folder", "path", "files", "bytes", "changed"},
                 {"kind": "hub", "repo", "branch", "commit", "url", "files", "bytes", "changed"},
                 {"kind": "url", "url", "files", "bytes", "changed"}]}

A Hub target has `pull_request` (its address), `tag` and `collection` where the recipe asks for
them. `changed` is False where the target held exactly these files already. Beside it lie
`published.json` (the listing), `recipe.yaml`, `provenance.json` and `model.sig` as published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantize.folder_target import publish_folder
from quantize.keys import digest
from quantize.listing import LISTING, damage, parse_listing
from quantize.protocol import write_json
from quantize.publication import Files, collect, target_folder
from quantize.store import VERIFY_ON_READ_BYTES

if TYPE_CHECKING:
    from quantize.stages.base import Resolved, StageContext
    from quantize.store import Artifact
    from quantize.targets import Hub

VERSION = 3


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
    target = target_folder(resolved.recipe)
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


def _to_folder(context: StageContext, files: Files) -> dict[str, Any]:
    target = target_folder(context.recipe)
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
