"""Calibration data → token ids, once, so that every engine sees the same.

Runs in the llmcompressor environment (transformers' tokenizers, datasets).

Request body: `model` (folder with the tokenizer), `source` (file, or Hub data set), `hub` (bool),
`revision`, `config`, `split`, `samples`, `sequence_length`, `packing`, `seed`, `output` (folder).
Result body: the statistics that are also written to `calibrate.json`. `rows.jsonl` has a line for
each row that is in `tokens.npz`, in the order in which they were drawn: {"row": its number in the
source, from 1; "text": what was tokenized; "tokens": of the whole row, before it is cut}.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from quantize.protocol import Events, Request, WorkerError, worker_main, write_atomic, write_json
from quantize.workers.rows import BadRow, json_lines, kind_of, text_lines

MINIMUM_TOKENS = 8
"""Shorter rows say nothing about activations and are dropped."""


@dataclass
class _Drawn:
    """What became of the rows that were looked at."""

    sequences: list[list[int]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # lines of rows.jsonl
    kinds: list[str] = field(default_factory=list)  # of `rows`
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0


def run(request: Request, events: Events) -> dict[str, Any]:
    """Read, draw, tokenize, cut; write `tokens.npz`, `rows.jsonl` and `calibrate.json`."""
    body = request.body
    tokenizer = AutoTokenizer.from_pretrained(
        body["model"], local_files_only=True, trust_remote_code=body.get("trust_remote_code", False)
    )
    rows = _rows(body)
    if not rows:
        raise WorkerError("SourceError", f"{body['source']} has no rows", "give it some data")
    drawn = _draw(body, tokenizer, rows, events)
    if not drawn.sequences:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in drawn.dropped.items()) or "none"
        raise WorkerError(
            "SourceError",
            f"no usable row among the {len(rows)} of {body['source']} (dropped: {reasons})",
            "rows need `messages` (with a chat template in the checkpoint) or `text`",
        )
    if drawn.dropped:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in drawn.dropped.items())
        events.note(f"calibration: {drawn.dropped.total()} rows were skipped ({reasons})")
    if len(drawn.sequences) < body["samples"]:
        events.note(
            f"calibration: only {len(drawn.sequences)} sequences, {body['samples']} were asked for"
        )
    return _write(body, drawn, len(rows))


def _draw(body: dict[str, Any], tokenizer: Any, rows: list[object], events: Events) -> _Drawn:
    """Rows in an order that the seed gives, until there are enough sequences."""
    drawn = _Drawn()
    order = list(range(len(rows)))
    random.Random(body["seed"]).shuffle(order)
    length, wanted = body["sequence_length"], body["samples"]
    pending: list[int] = []  # packing: tokens that do not fill a sequence yet
    starts: list[int] = []  # packing: place of each row's first token among all
    for index in order:
        if len(drawn.sequences) >= wanted:
            break
        ids, kind, text = _tokenize(tokenizer, rows[index])
        if len(ids) < MINIMUM_TOKENS and not (ids and body["packing"]):
            drawn.dropped[f"fewer than {MINIMUM_TOKENS} tokens" if ids else kind] += 1
            continue
        drawn.rows.append({"row": index + 1, "text": text, "tokens": len(ids)})
        drawn.kinds.append(kind)
        if body["packing"]:
            starts.append(len(drawn.sequences) * length + len(pending))
            pending += ids
            while len(pending) >= length:
                drawn.sequences.append(pending[:length])
                pending = pending[length:]
        else:
            drawn.truncated += len(ids) > length
            drawn.sequences.append(ids[:length])
        events.progress("tokenizing calibration rows", len(drawn.sequences), wanted, "sequences")
    del drawn.sequences[wanted:]
    if body["packing"]:  # the last rows may fill no sequence and are not in it
        used = sum(start < len(drawn.sequences) * length for start in starts)
        del drawn.rows[used:], drawn.kinds[used:]
    return drawn


def _write(body: dict[str, Any], drawn: _Drawn, rows: int) -> dict[str, Any]:
    output = Path(body["output"])
    lengths = [len(ids) for ids in drawn.sequences]
    np.savez(
        output / "tokens.npz",
        ids=np.concatenate([np.asarray(ids, np.int32) for ids in drawn.sequences]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in drawn.rows)
    write_atomic(output / "rows.jsonl", "".join(lines))
    kinds = Counter(drawn.kinds)
    statistics = {
        "source": body["source"] if body["hub"] else Path(body["source"]).name,
        "rows": rows,
        "rows_used": len(drawn.rows),
        "rows_by_kind": dict(kinds),
        "rows_dropped": dict(drawn.dropped),
        "rows_truncated": drawn.truncated,
        "sequences": len(drawn.sequences),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "sequence_length": body["sequence_length"],
        "packing": body["packing"],
        "seed": body["seed"],
        "chat_template_applied": kinds["messages"] > 0,
    }
    write_json(output / "calibrate.json", statistics)
    return statistics


def _tokenize(tokenizer: Any, row: object) -> tuple[list[int], str, str]:
    """Token ids, the row's kind and its text; or no ids and why the row is dropped."""
    kind, reason = kind_of(row)
    if kind is None or not isinstance(row, dict):
        return [], reason, ""
    if kind == "text":
        return tokenizer(row["text"])["input_ids"], kind, row["text"]
    if not tokenizer.chat_template:
        return [], "messages, but the checkpoint has no chat template", ""
    try:
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    except Exception as error:  # templates are programs and raise what they like
        return [], f"the chat template refuses it ({type(error).__name__})", ""
    # The template writes the special tokens itself.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"], kind, rendered


def _rows(body: dict[str, Any]) -> list[object]:
    if body["hub"]:
        import datasets

        dataset = datasets.load_dataset(
            body["source"], body["config"], split=body["split"], revision=body["revision"]
        )
        return list(dataset)
    path = Path(body["source"])
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".txt":
            return [{"text": block} for block in _blocks(path)]
        return [row for _, row in json_lines(path)]
    except BadRow as error:
        fault = f"{path}:{error.line}: {error.fault}"
        raise WorkerError("SourceError", fault, error.hint) from error


def _parquet(path: Path) -> list[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        fault = f"{path} is not a parquet file that can be read: {error}"
        raise WorkerError("SourceError", fault, "download or write it again") from error


def _blocks(path: Path) -> list[str]:
    """Paragraphs: text files have no rows of their own."""
    text = "".join(line for _, line in text_lines(path))
    return [block for block in text.split("\n\n") if block.strip()]


if __name__ == "__main__":
    worker_main(run)
