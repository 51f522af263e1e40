"""What the pipeline costs beside the tools: start-up, plan, a run that finds nothing to do.

    python bench/overhead.py [--store STORE] [--rounds 5]

With a store in which tiny-llama-awq is finished (the default store after the README's first
command), the last row is a whole second run. Rounds are interleaved; the table has the median and
the ratio to a bare Python start of the same run, which is what to compare between machines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--folder", type=Path, help="where the first run was started")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    quantize = [sys.executable, "-m", "quantize"]
    store = ["--store", str(options.store.resolve())] if options.store else []
    recipe = str(ROOT / "recipes" / "tiny-llama-awq.yaml")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "quantize --help": [*quantize, "--help"],
        "quantize plan llama3-70b-awq": [*quantize, "plan", "llama3-70b-awq"],
        "quantize run tiny-llama-awq (finished)": [*quantize, "run", recipe, *store],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or (Path.cwd() if not options.store else Path(scratch))
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                seconds[name].append(timed(command, folder))
    bare = statistics.median(seconds["python -c pass"])
    print(f"| command | median of {options.rounds}, s | of a bare Python start |")
    print("|---|---:|---:|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| `{name}` | {median:.2f} | ×{median / bare:.1f} |")


def timed(command: list[str], folder: Path) -> float:
    started = time.monotonic()
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - started


main()
