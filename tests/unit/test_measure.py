"""The measure stage where nothing can be served: its record says why, and of which checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint
from records_fixture import RECIPE, artifact, new_store, stage_context

from quantize.recipe_file import load_suite
from quantize.resources import shipped_root
from quantize.stages import measure
from quantize.store import Artifact, Store


def fetched(store: Store, key: str, folder: Path, parameters: int) -> Artifact:
    source = {"folder": str(folder), "parameters": parameters}
    made: Artifact = artifact(store, "fetch", key * 64, {"source.json": source})
    return made


def with_token(folder: Path, number: int) -> Path:
    """The checkpoint, with a token of this id in its tokenizer."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value.setdefault("added_tokens", []).append({"id": number, "content": "<|new|>"})
    path.write_text(json.dumps(value))
    return folder


def run(folder: Path, stage_id: str, inputs: dict[str, Artifact], **recipe: Any) -> dict[str, Any]:
    store = new_store(folder)
    context = stage_context(folder, store, stage_id, inputs, RECIPE | recipe)
    suite = load_suite(shipped_root() / "eval" / "suites" / "tiny.yaml")
    context.resolved = replace(context.resolved, suite=suite)
    measure.run(context)
    record: dict[str, Any] = json.loads((context.files / "record.json").read_text())
    return record


def test_a_base_without_rows_for_the_fine_tunes_tokens(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    base = write_checkpoint(tmp_path / "base")
    rows = measure.embedding_rows(base)
    tuned = with_token(write_checkpoint(tmp_path / "tuned"), rows)
    inputs = {"fetch": fetched(store, "a", tuned, 7), "model": fetched(store, "b", base, 5)}
    record = run(tmp_path, "measure-base", inputs)
    (missing,) = record["not_measured"]
    assert missing["what"] == "tasks"
    assert f"token ids up to {rows}" in missing["why"]
    assert f"embeddings for {rows} tokens" in missing["why"]
    assert (record["tasks"], record["quick"]) == ([], False)
    # what would have been served is the base, not the fine-tune
    assert (record["subject"]["key"], record["subject"]["parameters"]) == ("b" * 64, 5)


def test_a_candidate_that_is_not_served_here(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    source = fetched(store, "a", write_checkpoint(tmp_path / "model"), 7)
    made = artifact(store, "compress", "c" * 64, {"model/model.safetensors": b"12345"})
    record = run(
        tmp_path,
        "measure-candidate",
        {"fetch": source, "model": made},
        quantize={"method": "fp8", "scheme": "FP8"},
    )
    assert "static activation scales" in record["not_measured"][0]["why"]
    subject = {"key": "c" * 64, "bytes": 5, "parameters": 7}  # parameters before compression
    assert record["subject"] == subject
