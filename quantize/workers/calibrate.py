"""Calibration data → token ids, once, so that every engine sees the same.

Runs in the llmcompressor environment (transformers' tokenizers, datasets).

Request body: `model` (folder with the tokenizer), `source` (file, or Hub data set), `hub` (bool),
`revision`, `config`, `split`, `samples`, `sequence_length`, `packing`, `seed`, `output` (folder).
Result body: the statistics that are also written to `calibrate.json`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from quantize.protocol import Events, Request, WorkerError, worker_main, write_json

MINIMUM_TOKENS = 8
"""Shorter rows say nothing about activations and are dropped."""


def run(request: Request, events: Events) -> dict[str, Any]:
    """Read, draw, tokenize, cut; write `tokens.npz` and `calibrate.json`."""
    body = request.body
    tokenizer = AutoTokenizer.from_pretrained(body["model"], local_files_only=True)
    rows = _rows(body)
    if not rows:
        raise WorkerError("SourceError", f"{body['source']} has no rows", "give it some data")
    order = list(range(len(rows)))
    random.Random(body["seed"]).shuffle(order)
    dropped: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    used_rows = 0
    sequences: list[list[int]] = []
    pending: list[int] = []  # packing: tokens that do not fill a sequence yet
    truncated = 0
    length, wanted = body["sequence_length"], body["samples"]
    for index in order:
        if len(sequences) >= wanted:
            break
        ids, kind = _tokenize(tokenizer, rows[index])
        if not ids:
            dropped[kind] += 1
            continue
        if len(ids) < MINIMUM_TOKENS and not body["packing"]:
            dropped[f"fewer than {MINIMUM_TOKENS} tokens"] += 1
            continue
        used_rows += 1
        kinds[kind] += 1
        if body["packing"]:
            pending += ids
            while len(pending) >= length:
                sequences.append(pending[:length])
                pending = pending[length:]
        else:
            truncated += len(ids) > length
            sequences.append(ids[:length])
        events.progress("tokenizing calibration rows", len(sequences), wanted, "sequences")
    if not sequences:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none"
        raise WorkerError(
            "SourceError",
            f"no usable row among the {len(rows)} of {body['source']} (dropped: {reasons})",
            "rows need `messages` (with a chat template in the checkpoint) or `text`",
        )
    sequences = sequences[:wanted]
    if len(sequences) < wanted:
        events.note(f"calibration: only {len(sequences)} sequences, {wanted} were asked for")
    output = Path(body["output"])
    lengths = [len(ids) for ids in sequences]
    np.savez(
        output / "tokens.npz",
        ids=np.concatenate([np.asarray(ids, np.int32) for ids in sequences]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    statistics = {
        "source": body["source"] if body["hub"] else Path(body["source"]).name,
        "rows": len(rows),
        "rows_used": used_rows,
        "rows_by_kind": dict(kinds),
        "rows_dropped": dict(dropped),
        "rows_truncated": truncated,
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "sequence_length": length,
        "packing": body["packing"],
        "seed": body["seed"],
        "chat_template_applied": kinds["messages"] > 0,
    }
    write_json(output / "calibrate.json", statistics)
    return statistics


def _tokenize(tokenizer: Any, row: object) -> tuple[list[int], str]:
    """Token ids and the row's kind, or no ids and the reason why the row is dropped."""
    if not isinstance(row, dict):
        return [], "not an object"
    messages, text = row.get("messages"), row.get("text")
    if messages:
        if not tokenizer.chat_template:
            return [], "messages, but the checkpoint has no chat template"
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs and raise what they like
            return [], f"the chat template refuses it ({type(error).__name__})"
        # The template writes the special tokens itself.
        return tokenizer(rendered, add_special_tokens=False)["input_ids"], "messages"
    if isinstance(text, str) and text.strip():
        return tokenizer(text)["input_ids"], "text"
    return [], "neither `messages` nor `text`" if text is None else "empty text"


def _rows(body: dict[str, Any]) -> list[object]:
    if body["hub"]:
        import datasets

        dataset = datasets.load_dataset(
            body["source"], body["config"], split=body["split"], revision=body["revision"]
        )
        return list(dataset)
    path = Path(body["source"])
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    if path.suffix == ".txt":
        return [{"text": block} for block in _blocks(path)]
    return list(_json_lines(path))


def _json_lines(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise WorkerError(
                        "SourceError",
                        f"{path}:{number}: not JSON: {error}",
                        "each line is one object with `messages` or `text`",
                    ) from error


def _blocks(path: Path) -> list[str]:
    """Paragraphs: text files have no rows of their own."""
    return [block for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]


if __name__ == "__main__":
    worker_main(run)
