"""A checkpoint's shapes from its config alone, for models whose weights are not here.

Of Llama's layout (Llama, Mistral, Qwen2, Qwen3): grouped-query attention and a gated MLP in every
layer, without experts. Names and shapes are those of transformers' `modeling_llama.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantize.capacity.serving import attention
from quantize.tensors import TensorInfo

CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs.json"
"""Shapes from the published config.json of the models that shipped recipes name, by repository."""

ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def known_config(repository: str) -> dict[str, Any] | None:
    """What the config of a repository says of shapes, without asking the Hub; None if unknown."""
    found: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return found.get(repository)


def dense_tensors(config: Mapping[str, Any]) -> dict[str, TensorInfo] | None:
    """The tensors that a checkpoint with this config has, in BF16; None for other architectures."""
    architectures = config.get("architectures") or [""]
    shape = attention(config)
    known = isinstance(shape, dict) and architectures[0] in ARCHITECTURES
    if not known or not {"intermediate_size", "vocab_size"} <= set(config):
        return None
    return {
        name: TensorInfo(name, "BF16", size, Path("model.safetensors"), 0, 2 * prod(size))
        for name, size in _shapes(config, shape)  # type: ignore[arg-type]
    }


def _shapes(config: Mapping[str, Any], attention: Mapping[str, int]) -> Shapes:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(attention["layers"]):
        for name, size in _layer(config, attention):
            yield f"model.layers.{layer}.{name}", size
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def _layer(config: Mapping[str, Any], attention: Mapping[str, int]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = attention["head_size"]
    queries, keys = config["num_attention_heads"] * size, attention["kv_heads"] * size
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    for name, count in rows.items():
        yield f"self_attn.{name}.weight", (count, hidden)
        if config["architectures"][0] == "Qwen2ForCausalLM" or config.get("attention_bias"):
            yield f"self_attn.{name}.bias", (count,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if config["architectures"][0] == "Qwen3ForCausalLM":
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
