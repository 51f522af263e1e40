"""What each stage needs and costs: formulas, computed and not measured; see docs/capacity.md.

`serving` (KV cache, context, GPUs), `cards` (the table of GPUs), `parts` and `streaming` (what an
engine holds), `estimate` (every stage), `cost`, `from_config` (shapes from a config alone).
"""

from quantize.capacity.cards import CARDS, GPUS, Card, Gpu, find_card
from quantize.capacity.serving import (
    ALLOWANCE_BYTES,
    BF16_BYTES,
    FP8_BYTES,
    attention,
    cache_tokens,
    kv_bytes_per_token,
)

__all__ = [
    "ALLOWANCE_BYTES",
    "BF16_BYTES",
    "CARDS",
    "FP8_BYTES",
    "GPUS",
    "Card",
    "Gpu",
    "attention",
    "cache_tokens",
    "find_card",
    "kv_bytes_per_token",
]
