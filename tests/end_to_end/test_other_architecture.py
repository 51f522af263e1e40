"""Another architecture, sharded, with another kind of tokenizer, goes through the same command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Work, environment

pytestmark = pytest.mark.end_to_end

MAKE = Path(__file__).with_name("make_checkpoint.py")

SUITE = """\
version: 1
name: own
smoke: base
perplexity: {text: text.jsonl, window: 256, top_k: 20}
load: {requests: 4, concurrency: 2, input_tokens: 32, output_tokens: 8}
"""
SENTENCE = "The ferry at the weir carries {} sacks of barley to the mill before noon. "


def test_qwen3_with_its_own_recipe(
    work: Work, environment_python: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [SENTENCE.format(n) * 4 for n in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows[:20]))
    chats = [
        {"messages": [{"role": "user", "content": r}, {"role": "assistant", "content": r}]}
        for r in rows
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "own.yaml").write_text(SUITE)
    made = subprocess.run(
        [environment_python("llmcompressor"), MAKE, tmp_path / "model", tmp_path / "text.txt"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1

    recipe = tmp_path / "qwen.yaml"
    done = work.quantize("init", str(tmp_path / "model"), "--method", "gptq", "-o", str(recipe))
    assert done.code == 0, done.err
    changes = [
        "calibration.source=chats.jsonl",
        "calibration.samples=32",
        "calibration.sequence_length=256",
        "evaluate.suite=own.yaml",
        "evaluate.noise=false",
        "evaluate.margins.perplexity_ratio=none",  # a model that knows one sentence
        "publish.folder=" + str(tmp_path / "published"),
        "serve.max_model_len=1024",
    ]
    result = work.run(recipe, *[part for change in changes for part in ("--set", change)])
    record = json.loads(Path(result["places"]["record"]).read_text())
    assert record["calibration"]["rows_by_kind"] == {"messages": 32}
    assert record["compare"]["perplexity"]["ratio"] > 0
    assert len(record["candidate"]["smoke"]) > 0
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
