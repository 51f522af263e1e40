"""What is published of a run, and where its bytes are.

Every file of the compress artifact's `model/`, the card as `README.md` with `.eval_results/`, and
below `quantize/` the card's `record.json`, its `plots/` and `card.md.j2`, the `recipe.yaml`,
`provenance.json` (what it was made from), `model.sig` where the recipe signs, and `manifest.json`,
which lists all the others. An adapter that is kept apart lies below `adapter/`. Nothing names a
path of this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantize.keys import file_sha256
from quantize.listing import LISTING, SIGNATURE, not_as_made, refuse_hidden, write_listing
from quantize.protocol import write_atomic, write_json
from quantize.provenance import RECIPE, STATEMENT, statement
from quantize.report.redact import base_name, redact
from quantize.stages.card import recipe_values
from quantize.store import FileEntry

if TYPE_CHECKING:
    from quantize.recipe import Recipe
    from quantize.stages.base import Resolved, StageContext
    from quantize.targets import Sign

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
    """Where a signature of the same files may be: nearest first."""
    yield context.work / "model.sig"
    yield context.store.path("publish", context.entry.key or "") / "model.sig"
    publish = context.recipe.publish
    if publish.folder is not None:
        yield target_folder(context.recipe) / SIGNATURE
    if publish.hub is not None:
        from quantize.hub.client import access_from_environment
        from quantize.hub.repository import download_file

        access = access_from_environment()
        found = context.work / "on-the-hub"
        if download_file(access, publish.hub.repo, publish.hub.branch, SIGNATURE, found):
            yield found / SIGNATURE
    if publish.url is not None:
        from quantize.bucket.client import fetch_if_there, open_place

        found = context.work / "at-the-url.sig"
        if fetch_if_there(open_place(publish.url), SIGNATURE, found):
            yield found


def recipe_as_published(resolved: Resolved) -> str:
    """The text of `quantize/recipe.yaml`, before there is a card's record."""
    values: dict[str, Any] = redact(recipe_values(resolved.recipe))
    return recipe_text(resolved, values)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, file_sha256(path))


def target_folder(recipe: Recipe) -> Path:
    """The folder target; relative to the working directory, links resolved."""
    assert recipe.publish.folder is not None
    return Path(recipe.publish.folder).expanduser().resolve()
