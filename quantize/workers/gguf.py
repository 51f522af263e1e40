"""A BF16 GGUF file → one of llama.cpp's types, by llama-imatrix and llama-quantize.

Runs in the llamacpp environment. llama-imatrix reads text, and no token ids: it gets the texts of
the calibrate stage's rows, joined, and cuts their tokens anew into chunks. That llama.cpp makes the
same ids of each row is looked at first, and a row that it reads otherwise is an error. The matrix
is kept in the scratch folder, so that a run that is killed later does not compute it again.

Request body: `gguf` (the BF16 file), `output` (folder), `file` (name of what is made), `scheme`
(llama.cpp's name of the type), `tokens` (`tokens.npz` or null), `rows` (`rows.jsonl` or null),
`packing` (whether rows were joined), `model` (the source's folder), `copy` (names of files taken
over from there).
Result body: `seconds`, `peak_memory_bytes`, `versions`; with calibration `imatrix` ({"rows",
"tokens": of all rows, "context": of a chunk, "chunks"}).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantize.protocol import Events, Request, WorkerError, worker_main, write_atomic, write_json
from quantize.workers.llamacpp import (
    Vocabulary,
    peak_memory_bytes,
    program,
    run_program,
    versions,
)

LEAST_TOKENS = 64
"""Fewer in the whole calibration set make no matrix: llama-imatrix needs two chunks."""
LONGEST_CONTEXT = 4096
TEXTS = "calibration.txt"
"""A name without a folder: it is written into the matrix, and from there into the model."""
CHUNK = re.compile(rb"\[(\d+)\][\d.]+,")
CHUNKS = re.compile(rb"computing over (\d+) chunks")
TENSOR = re.compile(rb"\[ *(\d+)/ *(\d+)\]")


def run(request: Request, events: Events) -> dict[str, Any]:
    """Importance matrix where there is calibration, then the file."""
    body, work = request.body, Path(request.work)
    started = time.monotonic()
    output = Path(body["output"])
    command = [program("llama-quantize")]
    found: dict[str, Any] = {}
    if body["tokens"]:
        matrix = work / "imatrix.gguf"
        found["imatrix"] = _matrix(body, work, matrix, events)
        shutil.copyfile(matrix, output / matrix.name)
        command += ["--imatrix", matrix.name]  # which is written into the file
    part = work / "quantized.gguf"
    command += [body["gguf"], str(part), body["scheme"], str(_threads())]

    def seen(output: bytes) -> None:
        if places := TENSOR.findall(output):
            events.progress("quantizing", int(places[-1][0]), int(places[-1][1]), "tensors")

    run_program(command, seen, "llama-quantize", work)
    shutil.move(part, output / body["file"])
    for name in body["copy"]:
        shutil.copyfile(Path(body["model"], name), output / name)
    return {
        **found,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }


def _matrix(body: dict[str, Any], work: Path, matrix: Path, events: Events) -> dict[str, Any]:
    """Write the importance matrix, unless it is there; what it was made from."""
    about = work / "imatrix.json"
    if matrix.exists() and about.exists():
        events.note("the importance matrix of an earlier run is used")
        return dict(json.loads(about.read_text(encoding="utf-8")))
    texts = calibration_texts(body, Vocabulary(Path(body["gguf"])), events)
    tokens = sum(len(ids) for _, ids in texts)
    if tokens < LEAST_TOKENS:
        raise WorkerError(
            "SourceError",
            f"{tokens} calibration tokens are too few for an importance matrix",
            f"give calibration more data: at least {LEAST_TOKENS} tokens",
        )
    write_atomic(work / TEXTS, "".join(text for text, _ in texts))
    context = min(max(len(ids) for _, ids in texts), LONGEST_CONTEXT, tokens // 2)
    part = work / "imatrix.part"
    command = [program("llama-imatrix"), "--model", body["gguf"], "--file", TEXTS]
    command += ["--output-file", part.name, "--output-format", "gguf", "--parse-special"]
    command += ["--ctx-size", str(context), "--batch-size", str(context)]
    command += ["--threads", str(_threads())]

    def seen(output: bytes) -> None:
        total, done = CHUNKS.search(output), CHUNK.findall(output)
        if total and done:
            events.progress("importance matrix", int(done[-1]), int(total[1]), "chunks")

    run_program(command, seen, "llama-imatrix", work)
    part.replace(matrix)
    made = {
        "rows": len(texts),
        "tokens": tokens,
        "context": context,
        "chunks": tokens // context,
    }
    write_json(about, made)
    return made


def calibration_texts(
    body: dict[str, Any], vocabulary: Vocabulary, events: Events
) -> list[tuple[str, list[int]]]:
    """Of each row the text that llama-imatrix gets, and the ids that llama.cpp makes of it.

    Raises SourceError where llama.cpp tokenizes a row otherwise than the calibrate stage did.
    """
    lines = Path(body["rows"]).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    found = []
    for number, (row, ids) in enumerate(zip(rows, _row_ids(body, rows), strict=True), 1):
        text = row["text"]
        # A text row got BOS and EOS from the tokenizer, a chat has them in its text.
        read = [vocabulary.ids(text, add_special=special)[: len(ids)] for special in (False, True)]
        if ids not in read:
            raise WorkerError(
                "SourceError",
                f"llama.cpp tokenizes row {row['row']} of the calibration data otherwise than "
                f"transformers: {text[:120]!r}",
                "the model would be calibrated on other tokens: take the row out of the data, or "
                "remove the calibration block",
            )
        found.append(_as_text(text, ids, vocabulary))
        events.progress("comparing calibration rows", number, len(rows), "rows")
    return found


def _row_ids(body: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[int]]:
    """The calibrate stage's ids by row; where rows were packed, the last one may be cut."""
    arrays = np.load(body["tokens"])
    ids, ends = arrays["ids"].tolist(), arrays["offsets"].tolist()
    if body["packing"]:
        ends = [0, *itertools.accumulate(row["tokens"] for row in rows)]
    return [ids[start:end] for start, end in itertools.pairwise(ends)]


def _as_text(text: str, ids: list[int], vocabulary: Vocabulary) -> tuple[str, list[int]]:
    """A text that llama.cpp makes `ids` of, special tokens written out; or else the row's own."""
    for candidate in (vocabulary.text(ids), vocabulary.text(ids[:1]) + text):
        if vocabulary.ids(candidate, add_special=False) == ids:
            return candidate, ids
    return text, vocabulary.ids(text, add_special=False)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    worker_main(run)
