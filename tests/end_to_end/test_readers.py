"""Repacked artifacts, read by the tools whose formats they are in, and loaded by vLLM.

Where vLLM has no kernel for them, it loads the packed tensors all the same; the numbers are the
readers'. The same weights in compressed-tensors, by transformers, are what they are held against.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.environments import accelerator
from quantize.servers import cannot_serve
from tests.end_to_end.conftest import Work, environment
from tests.end_to_end.own_vllm import vllm

pytestmark = pytest.mark.end_to_end

QUESTIONS = (
    "Which colour do the roofs of Elmsgate have? Give only the answer.",
    "What colour is the coat of Wenna Pike?",
)
CASES = {
    # format → recipe, scheme, reader, nats by which it may differ: AutoAWQ computes in FP16
    "awq": ("tiny-llama-awq", "W4A16_ASYM", "autoawq", 0.15),
    "gptq": ("tiny-llama-gptq", "W4A16", "gptqmodel", 0.01),
}


@pytest.fixture(scope="module")
def artifacts(work: Work) -> Callable[[str], tuple[Path, Path]]:
    """The folders of a format's case: in compressed-tensors, and repacked."""

    def made(form: str) -> tuple[Path, Path]:
        recipe = CASES[form][0]
        plain = work.run(recipe, "--until", "audit")
        repacked = work.run(recipe, "--until", "audit", "--set", f"quantize.format={form}")
        return Path(plain["places"]["artifact"]), Path(repacked["places"]["artifact"])

    return made


@pytest.mark.parametrize("form", CASES)
def test_the_formats_own_reader_gives_the_same_answers(
    form: str,
    artifacts: Callable[[str], tuple[Path, Path]],
    environment_python: Callable[[str], Path],
) -> None:
    _, _, reader, nats = CASES[form]
    plain, repacked = artifacts(form)

    def read(name: str, folder: Path, place: str) -> list[dict[str, Any]]:
        driver = Path(__file__).with_name("own_readers.py")
        command = [environment_python(place), "-P", driver, name, folder, *QUESTIONS]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True
        )
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    expected = read("transformers", plain, "llmcompressor")
    found = read(reader, repacked, reader)
    assert len(found) == len(expected) == len(QUESTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["ids"] == theirs["ids"]
        difference = np.abs(np.array(ours["best"]) - np.array(theirs["best"])).max()
        assert difference < nats


@pytest.mark.parametrize("form", [pytest.param("awq", marks=pytest.mark.slow), "gptq"])
def test_vllm_loads_the_packed_tensors(
    form: str,
    artifacts: Callable[[str], tuple[Path, Path]],
    environment_python: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    scheme = CASES[form][1]
    if cannot_serve("vllm", form, scheme, accelerator()) is None:
        pytest.skip("test_elsewhere measures them through the kernels")
    _, repacked = artifacts(form)
    with vllm(environment_python("vllm"), repacked, tmp_path / "log", "--max-model-len", "256"):
        pass  # it is ready, so it has loaded them
