"""Several schemes and an FP8 KV cache in one checkpoint, by both engines: audited and served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.environments import accelerator
from quantize.servers import cannot_serve
from tests.end_to_end.conftest import ROOT, Work

pytestmark = pytest.mark.end_to_end

TINY = ROOT / "examples" / "tiny_llama"

RECIPE = f"""\
version: 1
name: mixed
model: {{source: {TINY / "instruct"}}}
calibration: {{source: {TINY / "calibration.jsonl"}, samples: 8, sequence_length: 128}}
quantize:
  method: awq
  kv_cache: fp8
  overrides:
    # Both of the first two name one module, and the alphabet has them the other way round.
    - {{modules: ['re:.*layers\\.1\\.mlp\\.down_proj$'], scheme: W4A16, group_size: 32}}
    - {{modules: ['re:.*down_proj$'], scheme: FP8_DYNAMIC}}
    - {{modules: ['re:.*layers\\.0\\.self_attn\\.[qkv]_proj$'], scheme: W4A16, group_size: channel}}
evaluate: {{suite: own.yaml, noise: false, margins: {{perplexity_ratio: none}}}}
"""
SUITE = f"""\
version: 1
name: own
smoke: tiny
perplexity: {{text: {ROOT / "eval/texts/valley.jsonl"}, window: 256, windows: 8, top_k: 20}}
load: {{requests: 4, concurrency: 2, input_tokens: 32, output_tokens: 8}}
"""


@pytest.mark.parametrize("engine", ["stream", "llmcompressor"])
def test_a_mixed_recipe(work: Work, tmp_path: Path, engine: str) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "own.yaml").write_text(SUITE)
    result = work.run(recipe, "--set", f"quantize.engine={engine}")
    artifact = Path(result["places"]["artifact"])
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["kv_cache_scheme"]["num_bits"] == 8
    record = json.loads(Path(result["places"]["record"]).read_text())
    assert record["audit"]["quantized_modules"] == 28
    if reason := cannot_serve("vllm", "compressed-tensors", "W4A16", accelerator()):
        # beside 8-bit activations, 4-bit weights cannot be unpacked: nothing is served
        assert record["compare"]["not_measured"][0]["why"] == reason
        return
    assert 1 / 1.2 < record["compare"]["perplexity"]["ratio"] < 1.2
    tokens = [record[side]["serving"]["kv_cache_tokens"] for side in ("baseline", "candidate")]
    assert tokens[1] == 2 * tokens[0]  # FP8 takes half of BF16
