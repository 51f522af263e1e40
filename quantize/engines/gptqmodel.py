"""GPTQModel 7.7, the maintained successor of AutoGPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.modules import matches

if TYPE_CHECKING:
    from quantize.quantization import Quantize

NAME = "gptqmodel"
SAID = "GPTQModel, the successor of AutoGPTQ"
ENVIRONMENT = "gptqmodel"
WORKER = "gptqmodel"
FORMAT = "gptq"
METHODS: Mapping[str, tuple[str, ...]] = {"gptq": ("W4A16", "W4A16_ASYM", "W8A16")}

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, "channel")
"""`TorchLinear.SUPPORTS_GROUP_SIZE`, 7.7.0; servers have fewer."""

MODEL_TYPES = frozenset(
    {
        *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *("phi", "starcoder2", "stablelm", "cohere", "cohere2", "granite", "smollm3", "olmo2"),
        *("olmo3", "exaone4", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
        *("gpt2", "gptj", "gpt_bigcode", "opt", "bloom", "mpt"),
    }
)
"""Dense text models of its table (7.7.0, `gptqmodel/models/auto.py`, MODEL_MAP) that transformers
knows without code of the checkpoint's own, each tried on a tiny model (test_engines.py). Not here:
codegen, gpt_neo and gpt_neox, which fail; and glm, glm4 and phi3, whose joined `gate_up_proj` it
saves as two modules that no loader looks for. Of types outside the table it guesses the layers."""

PACKED = 32
"""Inputs and outputs in whole parts of 32: it pads others, which no server's kernel reads."""


def cannot_do(quantize: Quantize) -> str | None:
    """One scheme for all linears of the layers; orders that need no permutation when served.

    `activation_order: static` is its `act_group_aware`, `none` neither that nor `desc_act`.
    `weight` would be `desc_act`, which vLLM has given up (0.32, `gptq_utils.py`,
    normalize_and_validate_gptq_desc_act).
    """
    if quantize.overrides:
        return "overrides"
    if quantize.kv_cache is not None:
        return "kv_cache"
    if quantize.effective_group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        return f"group_size {quantize.effective_group_size} (it has {sizes})"
    if quantize.activation_order == "weight":
        return "activation_order weight, which vLLM no longer serves (it has static and none)"
    if quantize.effective_group_size == "channel" and quantize.activation_order == "static":
        return "activation_order static with group_size channel (it has none)"
    return None if matches("lm_head", quantize.ignore) else "lm_head, which ignore does not name"


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Model types outside its table, and code of a checkpoint's own."""
    if "auto_map" in config:
        return "it would have to run the checkpoint's own code"
    kind = config.get("model_type")
    return None if kind in MODEL_TYPES else f"model type {kind} is not in its table"


def cannot_hold(module: str, shape: tuple[int, ...]) -> str | None:
    """See the protocol."""
    if all(size % PACKED == 0 for size in shape):
        return None
    return f"needs whole parts of {PACKED} inputs and outputs"
