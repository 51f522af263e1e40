"""The streaming engine's memory on a CPU, measured against docs/capacity.md's formulas.

    ENVIRONMENT/bin/python bench/memory.py --scratch FOLDER

ENVIRONMENT is the llmcompressor environment. Random BF16 checkpoints of a few layers, each method
in a fresh process; the highest resident size of the process (getrusage), beside the expected one.
Writes bench/memory.md, or --output. On a GPU, bench/engine_gpu.py has the same columns.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.engine_gpu import build, measure  # noqa: E402
from bench.predicted import peaks  # noqa: E402
from bench.random_llama import SHAPES  # noqa: E402

REPORT = Path(__file__).with_suffix(".md")
RUNS = ("tiny", "narrow", "vocabulary", "1B")
METHODS = ("fp8", "awq", "gptq", "awq+gptq")
HEADING = """# Memory

The streaming engine on a CPU ({machine}), {samples} x {length} random tokens: the highest resident
size of the process, and what docs/capacity.md computes.

```
python {command}
```

| method | shape, layers | measured | expected | expected ÷ measured |
|---|---|---:|---:|---:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(RUNS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=REPORT)
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    lines = [
        HEADING.format(
            machine=machine,
            samples=options.samples,
            length=options.length,
            command=" ".join(sys.argv),
        )
    ]
    print(lines[0])
    for name in options.shapes:
        shape, folder = SHAPES[name], options.scratch / f"memory-{name}"
        build(shape, folder, options.samples, options.length)
        try:
            for method in options.methods:
                measured = measure("stream", method, folder, None).host_bytes
                expected, _ = peaks(shape, method, options.samples, options.length, None)
                cells = (f"{measured / 1e6:,.0f} MB", f"{expected / 1e6:,.0f} MB")
                start = f"| {method} | {name}, {shape.layers} | {' | '.join(cells)}"
                lines.append(f"{start} | {expected / measured:.2f} |")
                print(lines[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
