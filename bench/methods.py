"""Every method on the shipped checkpoint, measured by the pipeline itself.

    python bench/methods.py --store STORE > bench/methods-table.md

Prints size, perplexity against BF16 and KL divergence of each method and scheme that this machine's
server can serve; the baseline is measured once. Takes about two minutes a row on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

METHODS = [
    ("rtn", "W4A16"),
    ("rtn", "W4A16_ASYM"),
    ("awq", "W4A16"),
    ("awq", "W4A16_ASYM"),
    ("gptq", "W4A16"),
    ("gptq", "W4A16_ASYM"),
    ("awq+gptq", "W4A16_ASYM"),
    ("int8", "W8A8"),
    ("fp8", "FP8_DYNAMIC"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    store = parser.parse_args().store.resolve()
    print("| method | scheme | size | perplexity | ratio to BF16 (95 %) | KL, mean | top-1 | s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for method, scheme in METHODS:
        row(method, scheme, store)


def row(method: str, scheme: str, store: Path) -> None:
    recipe = "tiny-llama-gptq"  # any of them: it has calibration data
    group = [] if scheme.startswith("W4") else ["quantize.group_size=null"]
    changes = [*group, f"quantize.method={method}", f"quantize.scheme={scheme}"]
    changes += ["evaluate.suite=perplexity", "publish.folder=null", "evaluate.margins={}"]
    command = [sys.executable, "-m", "quantize", "run", recipe, "--json", "--store", str(store)]
    command += [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    record = json.loads(Path(result["places"]["record"]).read_text())
    compare = record["compare"]
    perplexity, divergence = compare["perplexity"], compare["divergence"]
    low, high = perplexity["ratio_low"], perplexity["ratio_high"]
    print(
        f"| {method} | {scheme} | {record['size']['candidate_bytes'] / 1e6:.2f} MB "
        f"| {perplexity['candidate']:.4f} | {perplexity['ratio']:.4f} ({low:.4f} to {high:.4f}) "
        f"| {divergence['mean']:.5f} | {divergence['top1_agreement']:.2%} "
        f"| {record['compress']['seconds']:.0f} |",
        flush=True,
    )


main()
