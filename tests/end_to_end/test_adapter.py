"""A LoRA adapter on its base through the pipeline: merged, and kept apart with vLLM serving it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.keys import file_sha256
from tests.end_to_end.conftest import ROOT, Work

pytestmark = pytest.mark.end_to_end

EXAMPLES = ROOT / "examples" / "tiny_llama"
SUITE = f"""\
version: 1
name: pair
smoke: tiny
perplexity: {{text: {ROOT / "eval/texts/valley.jsonl"}, window: 512, top_k: 20}}
tasks_folder: {ROOT / "eval/tasks"}
tasks: [{{name: valley_qa, metric: exact_match, filter: stripped, apply_chat_template: true}}]
load: {{requests: 4, concurrency: 2, input_tokens: 32, output_tokens: 8}}
"""
PAIR = (f"model.source={EXAMPLES / 'base'}", f"model.adapter={EXAMPLES / 'lora'}")


def run(work: Work, recipe: str, *arguments: str, changes: tuple[str, ...]) -> dict[str, Path]:
    """Run it; the artifact's folder of every stage."""
    suite = work.folder / "pair.yaml"
    suite.write_text(SUITE)
    changes = (*PAIR, f"evaluate.suite={suite}", *changes)
    given = [part for change in changes for part in ("--set", change)]
    result = work.run(recipe, "--quick", *arguments, *given)
    kinds = {"fetch-adapter": "adapter", "fetch-base": "fetch"}
    return {
        stage["id"]: work.store
        / kinds.get(stage["id"], stage["id"].partition("-")[0])
        / stage["key"]
        for stage in result["stages"]
    }


@pytest.fixture(scope="module")
def merged(work: Work) -> dict[str, Path]:
    changes = ("name=tiny-llama-lora",)
    return run(work, "tiny-llama-fp8", "--until", "audit", changes=changes)


@pytest.fixture(scope="module")
def apart(work: Work) -> dict[str, Path]:
    changes = ("name=tiny-llama-pair", "model.adapter_mode=separate", "publish.folder=out/pair")
    return run(work, "tiny-llama-fp8", changes=changes)


def read(stage: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((stage / name).read_text())
    return value


def logprobs(stage: Path) -> np.ndarray:
    """Log-probabilities of the held-out text's tokens, nats."""
    with np.load(stage / "token_logprobs.npz") as arrays:
        found: np.ndarray = arrays["logprob"].astype(np.float64)
    return found


def score(stage: Path) -> float:
    """The mean of all tasks' scores."""
    tasks = read(stage, "record.json")["tasks"]
    return float(np.mean([task["score"] for task in tasks]))


def test_merged_checked_quantized_and_audited(merged: dict[str, Path]) -> None:
    source = read(merged["fetch"], "source.json")
    assert source["kind"] == "merged"
    assert source["chat_template"] is True
    check = source["merge_check"]
    assert check["passed"]
    assert check["logit_change"] < check["logit_change_of_adapter"] / 20
    base = (EXAMPLES / "base" / "model.safetensors").read_bytes()
    assert (merged["fetch"] / "model" / "model.safetensors").read_bytes() != base
    assert "audit" in merged


def test_the_adapter_took_effect(apart: dict[str, Path]) -> None:
    base = score(apart["measure-base"])
    assert score(apart["measure-baseline"]) > base + 0.1
    assert score(apart["measure-candidate"]) > base + 0.1


@pytest.mark.slow
def test_the_pair_answers_as_the_merged_model_does(work: Work, apart: dict[str, Path]) -> None:
    """In BF16 the pair is the merged model."""
    changes = ("name=tiny-llama-lora",)
    merged = run(work, "tiny-llama-fp8", "--until", "measure-baseline", changes=changes)
    pair, whole = logprobs(apart["measure-baseline"]), logprobs(merged["measure-baseline"])
    assert pair.shape == whole.shape
    assert abs(pair.mean() - whole.mean()) < 0.01
    assert np.corrcoef(pair, whole)[0, 1] > 0.995
    assert abs(score(apart["measure-baseline"]) - score(merged["measure-baseline"])) < 0.1


def test_every_request_named_the_adapter(apart: dict[str, Path]) -> None:
    for stage, with_adapter in (("baseline", True), ("candidate", True), ("base", False)):
        command = read(apart[f"measure-{stage}"], "record.json")["server"]["command"]
        assert ("--enable-lora" in command) == with_adapter
        served = command[command.index("--served-model-name") + 1]
        assert served == ("base" if with_adapter else "model")
    command = read(apart["measure-candidate"], "record.json")["server"]["command"]
    assert command[command.index("--lora-modules") + 1] == "model=ADAPTER"
    assert command[command.index("--max-lora-rank") + 1] == "16"
    # All parts went through: load and smoke are there, for the pair.
    record = read(apart["measure-candidate"], "record.json")
    assert record["smoke"]
    assert record["serving"]["output_tokens_per_second"] > 0
    assert record["subject"]["adapter"] == apart["fetch-adapter"].name


def test_the_base_is_what_was_quantized(merged: dict[str, Path], apart: dict[str, Path]) -> None:
    source = read(apart["fetch"], "source.json")
    assert source["kind"] == "folder"
    assert source["folder"] == str(EXAMPLES / "base")
    checks = {c["name"]: c for c in read(apart["audit"], "audit.json")["checks"]}
    assert checks["adapter"]["passed"]


def test_the_pair_is_published(work: Work, apart: dict[str, Path]) -> None:
    folder = work.folder / "out" / "pair"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        published = file_sha256(folder / "adapter" / name)
        assert published == file_sha256(EXAMPLES / "lora" / name)
    listed = {entry["name"] for entry in read(folder, "quantize/manifest.json")["files"]}
    assert {"adapter/adapter_config.json", "adapter/tokenizer.json"} <= listed
    card = (folder / "README.md").read_text()
    assert "--lora-modules tiny-llama-pair-adapter=./tiny-llama-pair/adapter" in card
    assert "--max-lora-rank 16" in card
