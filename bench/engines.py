"""Engines side by side on the shipped fine-tune, with and without its activation outliers.

    python bench/engines.py --store STORE

Each row is a run of the pipeline, on the same calibration tokens: perplexity and KL divergence
through vLLM, time and peak memory of quantizing. The baseline of each checkpoint is measured once.
Prints Markdown. About two minutes a row on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "tiny_llama" / "instruct"

ROWS: tuple[tuple[str, ...], ...] = (
    # who, engine, method, scheme, format, further changes of the recipe
    ("round to nearest", "stream", "rtn", "W4A16_ASYM", "compressed-tensors"),
    ("ours", "stream", "awq", "W4A16_ASYM", "compressed-tensors"),
    ("ours, clip", "stream", "awq", "W4A16_ASYM", "compressed-tensors", "quantize.clip=true"),
    ("llm-compressor", "llmcompressor", "awq", "W4A16_ASYM", "compressed-tensors"),
    ("AutoAWQ", "autoawq", "awq", "W4A16_ASYM", "awq"),
    ("ours", "stream", "gptq", "W4A16", "compressed-tensors"),
    ("llm-compressor", "llmcompressor", "gptq", "W4A16", "compressed-tensors"),
    ("GPTQModel", "gptqmodel", "gptq", "W4A16", "gptq"),
    ("ours", "stream", "awq+gptq", "W4A16_ASYM", "compressed-tensors"),
    ("llm-compressor", "llmcompressor", "awq+gptq", "W4A16_ASYM", "compressed-tensors"),
)
COLUMNS = (
    *("who", "method", "scheme", "format", "size"),
    *("perplexity ratio (95 %)", "KL, mean (95 %)", "s", "peak memory"),
)
WRITERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""What writes channels of a layer, and the linears that read them."""

OUTLIER = 6.0
"""A channel this many times the median one was multiplied: by 8, 16 or 32, see outliers.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--who", default="", help="only the rows of this one")
    arguments = parser.parse_args()
    store = arguments.store.resolve()
    plain = store.parent / "tiny-llama-without-outliers"
    without_outliers(CHECKPOINT, plain)
    for title, checkpoint in (("With outliers", CHECKPOINT), ("Without outliers", plain)):
        print(f"\n## {title}\n")
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---|---|---|---|---:|---|---|---:|---:|", flush=True)
        for row in ROWS:
            if arguments.who in row[0]:
                print(measured(row, checkpoint, store), flush=True)


def measured(row: tuple[str, ...], checkpoint: Path, store: Path) -> str:
    """Run the recipe of one row; its line."""
    who, engine, method, scheme, form, *more = row
    changes = [
        f"model.source={checkpoint}",
        "model.base=null",
        f"quantize.method={method}",
        f"quantize.scheme={scheme}",
        f"quantize.engine={engine}",
        f"quantize.format={form}",
        "evaluate.suite=perplexity",
        "evaluate.margins={}",
        "publish.folder=null",
        *more,
    ]
    command = [sys.executable, "-m", "quantize", "run", "tiny-llama-gptq", "--json"]
    command += ["--store", str(store), *(p for change in changes for p in ("--set", change))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
    result: dict[str, Any] = json.loads(done.stdout)
    if "record" not in result["places"]:
        return f"| {who} | {method} | {scheme} | {form} | failed: {result['error']['message']} |"
    record = json.loads(Path(result["places"]["record"]).read_text())
    compare, made = record["compare"], record["compress"]
    ratio, kl = compare["perplexity"], compare["divergence"]
    cells = [
        *(who, method, scheme, form),
        f"{record['size']['candidate_bytes'] / 1e6:.2f} MB",
        f"{ratio['ratio']:.4f} ({ratio['ratio_low']:.4f} to {ratio['ratio_high']:.4f})",
        f"{kl['mean']:.5f} ({kl['mean_low']:.5f} to {kl['mean_high']:.5f})",
        f"{made['seconds']:.0f}",
        f"{made['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def without_outliers(source: Path, target: Path) -> None:
    """The same function without outlier channels.

    What writes such a channel is divided by a power of two, and the columns that read it are
    multiplied: exact in BF16, so that both checkpoints give the same logits but for the order of
    sums.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint16, "r+", offset=8 + length)

    def tensor(name: str) -> Any:
        start, end = header[f"{name}.weight"]["data_offsets"]
        return data[start // 2 : end // 2].reshape(header[f"{name}.weight"]["shape"])

    layers = {name.split(".")[2] for name in header if name.startswith("model.layers.")}
    for layer in (f"model.layers.{number}" for number in sorted(layers)):
        for writer, readers in WRITERS:
            written = tensor(f"{layer}.{writer}")
            values = floats(written)
            size = np.abs(values) if values.ndim == 1 else np.linalg.norm(values, axis=1)
            ratio = size / np.median(size)
            power = np.where(ratio >= OUTLIER, np.round(np.log2(np.maximum(ratio, 1))), 0)
            factor = (2.0**power).astype(np.float32)
            written[:] = bf16(values / (factor if values.ndim == 1 else factor[:, None]))
            for reader in readers:
                columns = tensor(f"{layer}.{reader}")
                columns[:] = bf16(floats(columns) * factor)
    data.flush()


def floats(bits: Any) -> Any:
    """BF16 bits as FP32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bf16(values: Any) -> Any:
    """FP32 numbers that BF16 holds, as its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "scaling by a power of two is exact in BF16"
    return (bits >> 16).astype(np.uint16)


main()
