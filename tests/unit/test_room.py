"""What a stage still has to write, as the message about a full disk says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.plan import StageEntry
from quantize.recipe import Recipe
from quantize.room import room_needed, written_bytes
from quantize.source_checks import promised_bytes
from quantize.stages.base import Resolved
from quantize.store import Artifact, FileEntry, Manifest, Store

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama" / "instruct"
VALUES = {
    "version": 1,
    "name": "r",
    "model": {"source": str(SOURCE)},
    "quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 128, "ignore": ("lm_head",)},
    "publish": {"folder": "out"},
}
RESOLVED = Resolved(Recipe.model_validate(VALUES), Path(), "cpu", {})


def artifact(folder: Path, kind: str, total_bytes: int, **files: str) -> Artifact:
    folder.mkdir(parents=True)
    entries = [FileEntry("model/weights", total_bytes, "")]
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
        entries.append(FileEntry(f"{name}.json", 0, ""))
    return Artifact(folder, Manifest(kind, "k", {}, tuple(entries), "r", "", {}, {}))


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Artifact]:
    source = json.dumps({"kind": "folder", "folder": str(SOURCE)})
    return {
        "fetch": artifact(tmp_path / "fetch", "fetch", 0, source=source),
        "compress": artifact(tmp_path / "compress", "compress", 4000),
        "card": artifact(tmp_path / "card", "card", 500),
    }


def entry(kind: str) -> StageEntry:
    return StageEntry(kind, kind, "key", {}, {})


def test_compress_needs_what_the_scheme_promises_less_what_is_there(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    from quantize.checkpoint import read_checkpoint

    store = Store(tmp_path / "store")
    promised = promised_bytes(read_checkpoint(SOURCE), RESOLVED.recipe)
    assert promised > 1_000_000
    assert room_needed(entry("compress"), RESOLVED, store, artifacts) == promised
    staged = store.root / "compress" / ".staging" / "key" / "files" / "model"
    staged.mkdir(parents=True)
    (staged / "half").write_bytes(bytes(1000))
    assert written_bytes(store.root) == 1000
    assert room_needed(entry("compress"), RESOLVED, store, artifacts) == promised - 1000
    layers = store.root / "compress" / ".staging" / "key" / "work" / "stream"
    layers.mkdir(parents=True)
    (layers / "part-0.safetensors").write_bytes(bytes(3000))
    assert room_needed(entry("compress"), RESOLVED, store, artifacts) == promised - 3000


def test_convert_needs_what_the_other_format_takes(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    from quantize.checkpoint import read_checkpoint

    recipe = Recipe.model_validate(VALUES | {"quantize": {"method": "rtn", "format": "gptq"}})
    resolved, store = Resolved(recipe, Path(), "cpu", {}), Store(tmp_path / "store")
    source = read_checkpoint(SOURCE)
    ours = promised_bytes(source, recipe, "compressed-tensors")
    assert room_needed(entry("compress"), resolved, store, artifacts) == ours
    after = promised_bytes(source, recipe, "gptq")
    assert room_needed(entry("convert"), resolved, store, artifacts) == after != ours


def test_publish_needs_what_is_copied(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    assert room_needed(entry("publish"), RESOLVED, Store(tmp_path), artifacts) == 4500


def test_of_others_and_of_what_cannot_be_read_nothing_is_said(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    store = Store(tmp_path)
    assert room_needed(entry("audit"), RESOLVED, store, artifacts) is None
    assert room_needed(entry("compress"), RESOLVED, store, {}) is None
