"""The memory that the formulas expect against what the engine's process had at most."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, Work, environment

pytestmark = pytest.mark.end_to_end

SLACK_BYTES = 300_000_000


def check(measured: float, expected: float, what: str) -> None:
    assert measured <= expected, f"{what}: {measured / 1e6:.0f} MB, expected {expected / 1e6:.0f}"
    assert expected <= 2 * measured + SLACK_BYTES, f"{what}: {expected / measured:.1f} times"


def test_a_recipes_plan(work: Work, tmp_path: Path) -> None:
    """From the recipe to compress.json."""
    store = ("--store", str(work.store))
    done = work.quantize("run", "tiny-llama-awq-gptq", "--until", "compress", *store)
    assert done.code == 0, done.err
    plan = work.quantize("plan", "tiny-llama-awq-gptq", "--json", *store).json()
    stages = {stage["id"]: stage for stage in plan["needs"]["stages"]}
    keys = {stage["id"]: stage["key"] for stage in plan["stages"]}
    folder = work.store / "compress" / keys["compress"]
    record = json.loads((folder / "compress.json").read_text())
    assert record["engine"] == "stream"
    check(record["peak_memory_bytes"], stages["compress"]["host"]["bytes"], "compress")
    disk = {part["what"]: part["bytes"] for part in stages["compress"]["disk"]}
    shards = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    assert 0 <= shards - disk["the quantized checkpoint"] < 100_000, "headers beside the tensors"
    assert stages["compress"]["seconds"] > 0, "what it took is known"


def test_random_checkpoints(environment_python: Callable[[str], Path], tmp_path: Path) -> None:
    """A large vocabulary, whose reading is the worst moment."""
    output = tmp_path / "memory.md"
    command = [str(environment_python("llmcompressor")), str(ROOT / "bench" / "memory.py")]
    command += ["--scratch", str(tmp_path), "--output", str(output)]
    command += ["--shapes", "vocabulary", "--methods", "fp8"]
    subprocess.run(command, env=environment(), timeout=600, check=True, stdout=subprocess.PIPE)
    lines = output.read_text().splitlines()
    (row,) = [line.split("|") for line in lines if line.startswith("| fp8 | vocabulary")]
    measured, expected = (float(cell.split()[0].replace(",", "")) for cell in row[3:5])
    check(1e6 * measured, 1e6 * expected, row[1])
    assert not list(tmp_path.glob("memory-*"))
