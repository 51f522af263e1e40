"""A LoRA adapter on its base goes through the pipeline as one merged checkpoint."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.conftest import ROOT, Work

pytestmark = pytest.mark.end_to_end

EXAMPLES = ROOT / "examples" / "tiny_llama"


def test_merged_quantized_and_audited(work: Work) -> None:
    changes = [
        f"model.source={EXAMPLES / 'base'}",
        f"model.adapter={EXAMPLES / 'lora'}",
        "name=tiny-llama-lora",
    ]
    result = work.run(
        "tiny-llama-fp8", "--until", "audit", *[p for c in changes for p in ("--set", c)]
    )
    (fetch,) = [stage for stage in result["stages"] if stage["id"] == "fetch"]
    artifact = work.store / "fetch" / fetch["key"]
    source = json.loads((artifact / "source.json").read_text())
    assert source["kind"] == "merged"
    assert source["chat_template"] is True
    base = (EXAMPLES / "base" / "model.safetensors").read_bytes()
    assert (artifact / "model" / "model.safetensors").read_bytes() != base
    assert [stage["id"] for stage in result["stages"]][-1] == "audit"
