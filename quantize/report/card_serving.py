"""What a card says of serving: commands, what of them was run, memory, context, GPUs.

What is computed comes from :mod:`quantize.capacity` and from the record's shapes; what was run is
what the measurement's server was started with.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantize import capacity
from quantize.report.results import Record, bytes_text

SGLANG_SYMMETRIC_ONLY = "W4A16_ASYM"
"""SGLang, `layers/quantization/compressed_tensors/compressed_tensors.py`: packed integer weights
are taken if they are symmetric."""


@dataclass(frozen=True)
class Command:
    """A command line, and the flags of it that the measurement did not use."""

    text: str
    not_run: tuple[str, ...]


def vllm_command(record: Record) -> Command:
    """`vllm serve` with the settings of the measurement that make sense elsewhere, quoted."""
    serve = record["recipe"]["serve"]
    options = [("--dtype", "bfloat16")]
    if "max_model_len" in serve:
        options.append(("--max-model-len", str(serve["max_model_len"])))
    options.append(("--max-num-seqs", str(serve["max_num_seqs"])))
    options.append(("--gpu-memory-utilization", str(serve["gpu_memory_utilization"])))
    if serve["tensor_parallel_size"] > 1:
        options.append(("--tensor-parallel-size", str(serve["tensor_parallel_size"])))
    caching = "enable-prefix-caching"
    options.append((f"--{caching}" if serve["enable_prefix_caching"] else f"--no-{caching}", ""))
    lines = [shlex.join(part for part in option if part) for option in options]
    if serve["extra_args"]:
        lines.append(shlex.join(serve["extra_args"]))
    run: Sequence[str] = record.get("candidate", {}).get("server", {}).get("command", ())
    not_run = tuple(option[0] for option in options if not _was_run(option, run))
    text = " \\\n  ".join([f"vllm serve {shlex.quote(place(record))}", *lines])
    return Command(text, not_run)


def _was_run(option: tuple[str, str], run: Sequence[str]) -> bool:
    flag, value = option
    if flag not in run:
        return False
    after = list(run).index(flag) + 1
    return not value or (after < len(run) and run[after] == value)


def sglang_command(record: Record) -> str:
    """SGLang's server; it reads the format from config.json."""
    parts = [f"python -m sglang.launch_server --model-path {shlex.quote(place(record))}"]
    serve = record["recipe"]["serve"]
    if "max_model_len" in serve:
        parts.append(f"--context-length {serve['max_model_len']}")
    return " \\\n  ".join(parts)


def sglang_caution(record: Record) -> bool:
    """Whether a scheme of this checkpoint is one that SGLang does not take."""
    quantize = record["recipe"]["quantize"]
    schemes = [quantize["scheme"], *(part["scheme"] for part in quantize.get("overrides", ()))]
    return SGLANG_SYMMETRIC_ONLY in schemes


def transformers_code(record: Record) -> str:
    """A snippet that loads the checkpoint in transformers."""
    name = json.dumps(place(record))
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            f'model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")',
        )
    )


def place(record: Record) -> str:
    """The repository that it is published in, or a folder."""
    return record.get("target") or f"./{record['recipe']['name']}"


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
