"""What a card says of memory: GPUs, context, tensor-parallel sizes; computed, not measured.

The formulas are those of :mod:`quantize.capacity`, the shapes the record's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quantize import capacity
from quantize.report.results import Record, bytes_text


@dataclass(frozen=True)
class GpuRow:
    """Tokens of KV cache beside the weights on one GPU."""

    memory: str
    names: str
    baseline: str
    candidate: str


@dataclass(frozen=True)
class Memory:
    """What one token and one GPU hold, computed; `why_not` where the config does not tell."""

    why_not: str = ""
    layers: int = 0
    kv_heads: int = 0
    head_size: int = 0
    per_token: str = ""
    per_token_fp8: str = ""  # where the recipe has scales for it
    allowance: str = ""
    rows: tuple[GpuRow, ...] = ()


def memory(record: Record) -> Memory:
    """Memory to serve, by the formulas of :mod:`quantize.capacity`, at two bytes a value."""
    shape = record["source"]["attention"]
    if isinstance(shape, str):
        return Memory(why_not=shape)
    per_token = capacity.kv_bytes_per_token(shape)
    in_fp8 = capacity.kv_bytes_per_token(shape, capacity.FP8_BYTES)
    quantized_cache = "kv_cache" in record["recipe"]["quantize"]
    return Memory(
        layers=shape["layers"],
        kv_heads=shape["kv_heads"],
        head_size=shape["head_size"],
        per_token=bytes_text(per_token),
        per_token_fp8=bytes_text(in_fp8) if quantized_cache else "",
        allowance=bytes_text(capacity.ALLOWANCE_BYTES),
        rows=tuple(_gpu_row(record, gpu, per_token) for gpu in capacity.GPUS),
    )


def _gpu_row(record: Record, gpu: capacity.Gpu, per_token: int) -> GpuRow:
    utilization = record["recipe"]["serve"]["gpu_memory_utilization"]
    cells = [
        tokens_text(capacity.cache_tokens(gpu.bytes, utilization, record["size"][side], per_token))
        for side in ("baseline_bytes", "candidate_bytes")
    ]
    return GpuRow(f"{gpu.gigabytes} GB", gpu.names, *cells)


def tokens_text(count: int) -> str:
    """Rounded down to three significant digits; what does not fit is said in words."""
    if count == 0:
        return "does not fit"
    unit = 10 ** max(0, math.floor(math.log10(count)) - 2)
    return f"{count // unit * unit:,}"


@dataclass(frozen=True)
class ParallelSize:
    """A tensor-parallel size, and what of the shapes does not split evenly over it."""

    size: int
    faults: str


def parallel_sizes(record: Record) -> list[ParallelSize]:
    """Every size that was looked at, smallest first."""
    found: dict[str, Any] = record["audit"]["tensor_parallel"]
    sizes = sorted(found, key=int)
    return [ParallelSize(int(size), "; ".join(found[size])) for size in sizes]
