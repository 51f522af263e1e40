"""Which tensors a config.json promises: names and shapes by architecture, without its code.

The classes of transformers 5 are the source of the table; `tests/end_to_end/test_architectures.py`
builds each of them and compares. Transformers itself only warns where a checkpoint lacks a tensor,
and fills it at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias)$")
"""Buffers that old checkpoints carry and every loader computes."""


@dataclass(frozen=True)
class Promise:
    """A tensor's shape, and the keys of config.json that it comes from."""

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    required: bool = True


Promises = dict[str, Promise]


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama.

    `defaults` are what transformers takes for keys that config.json leaves out. A bias is named by
    the key that turns it on, or is "always" or None.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: str | None = None
    output_bias: str | None = None
    mlp_bias: str | None = None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    head_norms: Literal["head", "full"] | None = None  # q_norm and k_norm: of a head, or of all
    fused: bool = False  # qkv_proj and gate_up_proj
    mlp: Literal["gated", "plain"] = "gated"
    experts: Experts | None = None


@dataclass(frozen=True)
class Experts:
    """Where a layer's experts are, and what config.json calls their number and width."""

    block: str = "mlp"
    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None  # the key of a shared expert's width
    some_dense: bool = False  # decoder_sparse_step and mlp_only_layers


LLAMA_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
GEMMA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(**LLAMA_BIAS, mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family({"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Family({"num_key_value_heads": 32}, qkv_bias="always"),
    "Qwen2MoeForCausalLM": Family(
        {"num_key_value_heads": 16, "qkv_bias": True},
        qkv_bias="qkv_bias",
        experts=Experts(shared="shared_expert_intermediate_size", some_dense=True),
    ),
    "Qwen3ForCausalLM": Family(
        {"num_key_value_heads": 32, "head_dim": 128}, **LLAMA_BIAS, head_norms="head"
    ),
    "Qwen3MoeForCausalLM": Family(
        {"num_key_value_heads": 4},
        **LLAMA_BIAS,
        head_norms="head",
        experts=Experts(some_dense=True),
    ),
    "MixtralForCausalLM": Family(
        {"num_key_value_heads": 8},
        experts=Experts(
            "block_sparse_moe",
            ("num_local_experts", "num_experts"),
            "intermediate_size",
            ("w1", "w3", "w2"),
        ),
    ),
    "OlmoeForCausalLM": Family(
        **LLAMA_BIAS, head_norms="full", experts=Experts(width="intermediate_size")
    ),
    "GemmaForCausalLM": Family(GEMMA | {"num_key_value_heads": 16}, **LLAMA_BIAS),
    "Gemma2ForCausalLM": Family(GEMMA, **LLAMA_BIAS, norms=SANDWICH),
    "Gemma3ForCausalLM": Family(GEMMA, **LLAMA_BIAS, norms=SANDWICH, head_norms="head"),
    "Phi3ForCausalLM": Family(fused=True),
    "Olmo2ForCausalLM": Family(**LLAMA_BIAS, norms=BEHIND, head_norms="full"),
    "Olmo3ForCausalLM": Family(**LLAMA_BIAS, norms=BEHIND, head_norms="full"),
    "GraniteForCausalLM": Family(**LLAMA_BIAS, mlp_bias="mlp_bias"),
    "SmolLM3ForCausalLM": Family(
        {"num_key_value_heads": 4, "tie_word_embeddings": True}, **LLAMA_BIAS, mlp_bias="mlp_bias"
    ),
    "Starcoder2ForCausalLM": Family(
        {"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        mlp="plain",
    ),
}


MOST_TENSORS = 300_000
"""Where promises end: four times what the largest models have, since a config may promise anything
(384 experts in 61 layers take 70,000)."""


def promised_tensors(
    architecture: str, config: Mapping[str, Any], *, fused_experts: bool = False
) -> Promises | None:
    """The tensors of a checkpoint with this config; None where the table cannot tell.

    `config` is the language model's. `fused_experts`: the experts of a layer are one tensor, as
    transformers 5 holds them in memory, instead of one for each.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        return None
    sizes = _sizes(family, config)
    if sizes is None:
        return None
    return dict(islice(_model(family, sizes, fused_experts), MOST_TENSORS))


@dataclass(frozen=True)
class _Sizes:
    """The numbers of a config, with the defaults filled in."""

    config: Mapping[str, Any]
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head: int

    def number(self, *keys: str) -> int:
        """The first of several spellings of a whole number; a KeyError where there is none."""
        for key in keys:
            if type(self.config.get(key)) is int:
                return int(self.config[key])
        raise KeyError(keys[0])

    def on(self, key: str | None) -> bool:
        """Whether a bias is there."""
        return key == "always" or (key is not None and bool(self.config.get(key)))


def _sizes(family: Family, stated: Mapping[str, Any]) -> _Sizes | None:
    """None where a number that the shapes need is neither stated nor has a default."""
    config = {**family.defaults, **{k: v for k, v in stated.items() if v is not None}}
    needed = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    if any(type(config.get(key)) is not int or config[key] < 1 for key in needed):
        return None
    hidden, layers, vocabulary, heads = (int(config[key]) for key in needed)
    kv_heads, head = config.get("num_key_value_heads", heads), config.get("head_dim")
    if stated.get("num_key_value_heads", 0) is None:  # null: as many as heads
        kv_heads = heads
    head = hidden // heads if head is None else head
    if type(kv_heads) is not int or type(head) is not int:
        return None
    sizes = _Sizes(config, hidden, layers, vocabulary, heads, kv_heads, head)
    try:
        if family.experts is None:
            sizes.number("intermediate_size")
        else:
            _expert_sizes(family.experts, sizes)
            if family.experts.some_dense:
                sizes.number("intermediate_size")
    except KeyError:
        return None
    return sizes


def _model(family: Family, sizes: _Sizes, fused_experts: bool) -> Iterator[tuple[str, Promise]]:
    keys: tuple[str, ...] = ("vocab_size", "hidden_size")
    outer = Promise((sizes.vocabulary, sizes.hidden), keys)
    yield "model.embed_tokens.weight", outer
    yield from _norm("model.norm", sizes.hidden, ("hidden_size",), bias=family.norm_bias)
    tied = bool(sizes.config.get("tie_word_embeddings", False))
    keys = (*keys, "tie_word_embeddings")
    yield "lm_head.weight", Promise(outer.shape, keys, required=not tied)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        for norm in family.norms:
            yield from _norm(prefix + norm, sizes.hidden, ("hidden_size",), bias=family.norm_bias)
        yield from _attention(prefix + "self_attn.", family, sizes)
        if family.experts is not None and _is_sparse(family.experts, sizes, layer):
            yield from _experts(prefix, family.experts, sizes, fused_experts)
        else:
            width = sizes.number("intermediate_size")
            keys = ("intermediate_size", "hidden_size")
            yield from _mlp(prefix + "mlp.", family, sizes, width, keys)


def _norm(
    name: str, size: int, keys: tuple[str, ...], *, bias: bool = False
) -> Iterator[tuple[str, Promise]]:
    yield name + ".weight", Promise((size,), keys)
    if bias:
        yield name + ".bias", Promise((size,), keys)


def _linear(
    name: str, rows: int, columns: int, keys: tuple[str, ...], *, bias: bool
) -> Iterator[tuple[str, Promise]]:
    yield name + ".weight", Promise((rows, columns), keys)
    if bias:
        yield name + ".bias", Promise((rows,), keys)


def _attention(prefix: str, family: Family, sizes: _Sizes) -> Iterator[tuple[str, Promise]]:
    all_heads, all_kv = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    for_q = ("num_attention_heads", "head_dim", "hidden_size")
    for_kv = ("num_key_value_heads", "head_dim", "hidden_size")
    bias = sizes.on(family.qkv_bias)
    if family.fused:
        together, rows = (*for_q[:1], *for_kv), all_heads + 2 * all_kv
        yield from _linear(prefix + "qkv_proj", rows, sizes.hidden, together, bias=bias)
    else:
        for part, rows, keys in (
            ("q", all_heads, for_q),
            ("k", all_kv, for_kv),
            ("v", all_kv, for_kv),
        ):
            yield from _linear(f"{prefix}{part}_proj", rows, sizes.hidden, keys, bias=bias)
    bias = sizes.on(family.output_bias)
    yield from _linear(prefix + "o_proj", sizes.hidden, all_heads, for_q, bias=bias)
    if family.head_norms is not None:
        whole = family.head_norms == "full"
        yield from _norm(prefix + "q_norm", all_heads if whole else sizes.head, for_q)
        yield from _norm(prefix + "k_norm", all_kv if whole else sizes.head, for_kv)


def _mlp(
    prefix: str, family: Family, sizes: _Sizes, width: int, keys: tuple[str, ...]
) -> Iterator[tuple[str, Promise]]:
    bias = sizes.on(family.mlp_bias)
    ups, down = {"gate_proj": width, "up_proj": width}, "down_proj"
    if family.mlp == "plain":
        ups, down = {"c_fc": width}, "c_proj"
    elif family.fused:
        ups = {"gate_up_proj": 2 * width}
    for name, rows in ups.items():
        yield from _linear(prefix + name, rows, sizes.hidden, keys, bias=bias)
    yield from _linear(prefix + down, sizes.hidden, width, keys, bias=bias)


def _expert_sizes(experts: Experts, sizes: _Sizes) -> tuple[int, int]:
    return sizes.number(*experts.count), sizes.number(experts.width)


def _is_sparse(experts: Experts, sizes: _Sizes, layer: int) -> bool:
    """Qwen's rule (`modeling_qwen3_moe.py`, Qwen3MoeDecoderLayer)."""
    if not experts.some_dense:
        return True
    step = sizes.config.get("decoder_sparse_step", 1)
    dense = sizes.config.get("mlp_only_layers")
    if isinstance(dense, list) and layer in dense:
        return False
    return type(step) is int and step != 0 and (layer + 1) % step == 0


def _experts(
    prefix: str, experts: Experts, sizes: _Sizes, fused: bool
) -> Iterator[tuple[str, Promise]]:
    """A router and its experts: each with three linears, or all of them in two tensors."""
    count, width = _expert_sizes(experts, sizes)
    block = f"{prefix}{experts.block}."
    keys: tuple[str, ...] = (experts.width, "hidden_size")
    routed = Promise((count, sizes.hidden), (experts.count[0], "hidden_size"))
    yield block + "gate.weight", routed
    gate, up, down = experts.names
    if fused:
        keys = (experts.count[0], *keys)
        yield block + "experts.gate_up_proj", Promise((count, 2 * width, sizes.hidden), keys)
        yield block + "experts.down_proj", Promise((count, sizes.hidden, width), keys)
    else:
        for expert in range(count):
            name = f"{block}experts.{expert}."
            for part in (gate, up):
                yield f"{name}{part}.weight", Promise((width, sizes.hidden), keys)
            yield f"{name}{down}.weight", Promise((sizes.hidden, width), keys)
    if experts.shared is not None:
        shared = sizes.number(experts.shared)
        keys = (experts.shared, "hidden_size")
        for part in (gate, up):
            yield f"{block}shared_expert.{part}.weight", Promise((shared, sizes.hidden), keys)
        yield f"{block}shared_expert.{down}.weight", Promise((sizes.hidden, shared), keys)
        yield block + "shared_expert_gate.weight", Promise((1, sizes.hidden), ("hidden_size",))
