"""GGUF through llama.cpp: the server answers, its library scores, and both are the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Work

pytestmark = pytest.mark.end_to_end

PERPLEXITY = 2.1500
"""By transformers, of the shipped checkpoint in BF16 on the same windows; 2.14987 in FP32."""


@pytest.fixture(scope="module")
def record(work: Work) -> dict[str, Any]:
    evaluate = "evaluate={suite: tiny, gate: {tasks: [valley_qa], inconclusive: pass}}"
    sets = ("--set", evaluate, "--set", "quantize.scheme=Q8_0")
    result = work.run("tiny-llama-gguf", *sets, "--until", "card")
    made: dict[str, Any] = json.loads(Path(result["places"]["record"]).read_text())
    return made


def test_the_baseline_is_what_transformers_computes(record: dict[str, Any]) -> None:
    found = record["baseline"]["perplexity"]
    assert found["scored_tokens"] == 23191
    assert found["perplexity"] == pytest.approx(PERPLEXITY, rel=2e-3)


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_server_and_library_agree(side: str, record: dict[str, Any]) -> None:
    measured = record[side]
    assert measured["server"]["name"] == "llamacpp"
    agreement = measured["perplexity"]["scored_by"]
    assert agreement["continuations"] == 8
    assert agreement["tokens_equal"] > 0.8 * agreement["tokens"]
    assert agreement["largest_difference_nats"] < 0.01


def test_eight_bits_lose_little(record: dict[str, Any]) -> None:
    compare = record["compare"]
    assert 0.99 < compare["perplexity"]["ratio"] < 1.01
    assert 0 < compare["divergence"]["mean"] < 0.01
    (task,) = compare["tasks"]  # the one that generates
    assert task["name"] == "valley_qa"
    assert task["baseline"] > 0.4


def test_what_is_not_measured_is_said(record: dict[str, Any]) -> None:
    for side in ("baseline", "candidate"):
        missing = {entry["what"]: entry["why"] for entry in record[side]["not_measured"]}
        assert set(missing) == {
            "task valley_mc",
            "special tokens in answers",
            "latency and throughput",
        }
        assert "llama-server gives no log-probabilities" in missing["task valley_mc"]
        assert "serving" not in record[side]
        assert "template_echo" not in record[side]["health"]
