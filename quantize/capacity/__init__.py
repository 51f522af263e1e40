"""What each stage needs and costs: formulas, computed and not measured; see docs/capacity.md.

`serving` (KV cache, context, GPUs), `cards` (the table of GPUs), `parts` and `streaming` (what an
engine holds), `estimate` (every stage), `cost`, `from_config` (shapes from a config alone).
"""

from quantize.capacity.cards import GPUS, Gpu
from quantize.capacity.serving import (
    ALLOWANCE_BYTES,
    FP8_BYTES,
    attention,
    cache_tokens,
    kv_bytes_per_token,
)

__all__ = [
    "ALLOWANCE_BYTES",
    "FP8_BYTES",
    "GPUS",
    "Gpu",
    "attention",
    "cache_tokens",
    "kv_bytes_per_token",
]
