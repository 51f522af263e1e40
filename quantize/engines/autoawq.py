"""AutoAWQ 0.2.9, archived upstream since May 2025; kept because recipes in the field name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.engine.config4 import NotTheSame, for_transformers_4
from quantize.engine.support import NOT_CLIPPED
from quantize.modules import matches

if TYPE_CHECKING:
    from quantize.quantization import Quantize

NAME = "autoawq"
SAID = "AutoAWQ"
ENVIRONMENT = "autoawq"
WORKER = "autoawq"
FORMAT = "awq"
METHODS: Mapping[str, tuple[str, ...]] = {"awq": ("W4A16_ASYM",)}

GROUP_SIZES = (32, 64, 128)
"""Its kernels', and vLLM's (`AWQ_TRITON_SUPPORTED_GROUP_SIZES`); the scale search needs groups."""

MODEL_TYPES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
        *("starcoder2", "stablelm", "phi3", "cohere"),
    }
)
"""Dense text models of its table (0.2.9, `awq/models/auto.py`) that transformers 4.51.3 knows and
whose rotary embedding is `model.rotary_emb`, where its quantizer looks for it (`quantizer.py`)."""

CLIPPED_ROWS, PACKED_ROWS = 64, 8
"""Outputs come in whole parts of 64 where ranges are clipped (`_compute_best_clip`), of 8 in one
int32 (`WQLinear_GEMM`)."""


def cannot_do(quantize: Quantize) -> str | None:
    """One scheme for all linears of the layers, in groups; the head stays as it is."""
    if quantize.overrides:
        return "overrides"
    if quantize.kv_cache is not None:
        return "kv_cache"
    if quantize.clip:
        return "clip as an option (it always clips)"
    if quantize.effective_group_size not in GROUP_SIZES:
        return f"group_size {quantize.effective_group_size} (it has 32, 64 and 128)"
    return None if matches("lm_head", quantize.ignore) else "lm_head, which ignore does not name"


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Model types outside its table, code of a checkpoint's own, what transformers 4.51 has not."""
    if "auto_map" in config:
        return "it would have to run the checkpoint's own code"
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        return f"model type {kind} is not in its table, or does not run with transformers 4.51"
    try:
        for_transformers_4(config)
    except NotTheSame as error:
        return str(error)
    return None


def cannot_hold(module: str, shape: tuple[int, ...]) -> str | None:
    """See the protocol."""
    name = module.rpartition(".")[2]
    rows = PACKED_ROWS if any(part in name for part in NOT_CLIPPED) else CLIPPED_ROWS
    return None if shape[0] % rows == 0 else f"needs whole parts of {rows} outputs"
