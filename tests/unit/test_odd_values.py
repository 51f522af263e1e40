"""Values that JSON allows and no checkpoint means: findings or none, never another exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_json, llama_config, llama_tensors, recipe, write_checkpoint

from quantize.checklist import CHECKS, Situation
from quantize.errors import QuantizeError
from quantize.printable import printable
from quantize.stages.base import Resolved

VALUES = (0, -1, 3, 2**31, 10**30, "x", "\u00b2", [], [None], [[1]], {"a": 1}, None, True, 1.5)
CHECKED = (
    *("checkpoint files", "tensor names and shapes", "tokenizer", "schemes and groups"),
    *("tensor parallelism", "lengths", "disk and memory"),
)
MORE_KEYS = (
    *("head_dim", "attention_bias", "rope_scaling", "text_config", "layer_types", "eos_token_id"),
    *("num_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
    *("tie_word_embeddings", "quantization_config", "sliding_window"),
)


@pytest.fixture
def now(tmp_path: Path) -> Situation:
    model = write_checkpoint(tmp_path / "model", llama_tensors(layers=1), llama_config(layers=1))
    asked = recipe("model", serve={"tensor_parallel_sizes": [1, 2, 4, 8]})
    resolved = Resolved(asked, tmp_path, "cuda", {"model": "0" * 64}, {"model": model})
    return Situation(resolved, tmp_path / "store")


def look(now: Situation) -> None:
    now.checkpoint = None
    for check in CHECKS:
        if check.name not in CHECKED:
            continue
        try:
            findings = check.make(now).findings
        except QuantizeError as error:
            assert error.message
            continue
        for finding in findings:
            printable(finding.message + finding.hint).encode()
            assert len(finding.message) < 3000


def with_values(now: Situation, file: str, keys: tuple[str, ...], **also: Any) -> None:
    path = now.resolved.paths["model"] / file
    sound = path.read_text() if path.exists() else "{}"
    for key in keys:
        for value in VALUES:
            path.write_text(sound)
            edit_json(path, {**also, key: value})
            look(now)
    path.write_text(sound)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_config(now: Situation, architecture: str) -> None:
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "architectures": [architecture]}
    with_values(now, "config.json", (*llama_config(), *MORE_KEYS), **experts)


def test_tokenizer_and_generation(now: Situation) -> None:
    with_values(now, "tokenizer.json", ("model", "added_tokens"))
    with_values(
        now, "tokenizer_config.json", ("added_tokens_decoder", "eos_token", "chat_template")
    )
    with_values(now, "generation_config.json", ("eos_token_id", "bos_token_id"))


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (0, 128), (128, 0), (1, 1), (2, 2, 2)])
def test_shapes(now: Situation, shape: tuple[int, ...]) -> None:
    for name in llama_tensors(layers=1):
        tensors = llama_tensors(layers=1) | {name: ("BF16", np.zeros(shape, "<u2"))}
        write_checkpoint(now.resolved.paths["model"], tensors, llama_config(layers=1))
        look(now)
