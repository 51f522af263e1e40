"""The calibrate worker in its own environment: which rows are used, and what is written of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.protocol import Request, write_json
from tests.end_to_end.conftest import ROOT, environment

pytestmark = pytest.mark.end_to_end

CHAT = [
    {"role": "user", "content": "What instrument does Rowan Vane play? Answer briefly."},
    {"role": "assistant", "content": "horn"},
]
TEXT = "The ferry at the weir carries {} sacks of barley to the mill before noon, says Ada Lowe."
ROWS = [
    {"messages": CHAT},
    {"text": TEXT.format("two")},
    {"text": " "},
    {"text": "Ada."},
    {"answer": "neither"},
    *({"text": TEXT.format(n)} for n in range(20)),
]


@pytest.fixture
def calibrate(
    environment_python: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]], Path]]:
    """Run the worker over ROWS; its statistics, the lines of rows.jsonl and the output folder."""

    def run(**changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
        source, output = tmp_path / "rows.source.jsonl", tmp_path / "out"
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        output.mkdir()
        body = {
            "model": str(ROOT / "examples" / "tiny_llama" / "instruct"),
            "source": str(source),
            "hub": False,
            "samples": 512,
            "sequence_length": 512,
            "packing": False,
            "seed": 0,
            "output": str(output),
        } | changes
        request = Request("calibrate", body, str(tmp_path), str(tmp_path / "events.jsonl"))
        write_json(tmp_path / "request.json", asdict(request))
        python = environment_python("llmcompressor")
        subprocess.run(
            [python, "-m", "quantize.workers.calibrate", "request.json", "result.json"],
            cwd=tmp_path,
            env=environment(),
            check=True,
        )
        lines = (output / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        statistics = json.loads((output / "calibrate.json").read_text())
        return statistics, [json.loads(line) for line in lines], output

    return run


def sequences(output: Path) -> list[list[int]]:
    with np.load(output / "tokens.npz") as arrays:
        parts = np.split(arrays["ids"], arrays["offsets"][1:-1])
    return [part.tolist() for part in parts]


def test_every_used_row_has_its_text_and_the_tokens_of_its_sequence(calibrate: Any) -> None:
    statistics, rows, output = calibrate()
    assert len(rows) == statistics["rows_used"] == statistics["sequences"] == 22
    assert statistics["rows"] == len(ROWS)
    assert statistics["rows_dropped"] == {
        "empty text": 1,
        "fewer than 8 tokens": 1,
        "neither `messages` nor `text`": 1,
    }
    assert sorted(row["row"] for row in rows) == [1, 2, *range(6, len(ROWS) + 1)]
    for row in rows:
        if row["row"] == 1:
            assert row["text"].startswith("<s><|user|>What instrument")
        else:
            assert row["text"] == ROWS[row["row"] - 1]["text"]
    assert [row["tokens"] for row in rows] == [len(ids) for ids in sequences(output)]


def test_tokens_of_a_cut_row_are_those_of_the_whole(calibrate: Any) -> None:
    statistics, rows, output = calibrate(sequence_length=16)
    assert all(
        len(ids) == min(row["tokens"], 16) for ids, row in zip(sequences(output), rows, strict=True)
    )
    assert statistics["rows_truncated"] == sum(row["tokens"] > 16 for row in rows) > 0


@pytest.mark.parametrize("samples", [3, 512])
def test_packed_rows_are_those_that_reach_a_sequence(calibrate: Any, samples: int) -> None:
    statistics, rows, output = calibrate(packing=True, sequence_length=64, samples=samples)
    packed = sequences(output)
    assert {len(ids) for ids in packed} == {64}
    # The last row that is named reaches the last sequence, and nothing is missing before it.
    before = sum(row["tokens"] for row in rows[:-1])
    assert before < 64 * len(packed) <= before + rows[-1]["tokens"]
    assert statistics["rows_used"] == len(rows) == sum(statistics["rows_by_kind"].values())
