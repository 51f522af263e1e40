"""Run all schedules: ``python -m tests.faults [--major 1] [--pairs 100] [--only TEXT]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Outcome, Part, run_campaign


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--major", type=int, action="append", help="of huggingface_hub; both")
    parser.add_argument("--pairs", type=int, default=100, help="drawn pairs for each scenario")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn pairs")
    parser.add_argument("--every", type=int, default=1, help="only every N-th systematic one")
    parser.add_argument("--only", default="", help="schedules whose name has this text")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    part = Part(arguments.every, arguments.pairs, arguments.seed, arguments.only)
    failed = False
    for major in arguments.major or (1, 2):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_campaign(major, Path(folder), part, arguments.workers)
        print(summary(outcome, time.monotonic() - started), flush=True)
        failed = failed or bool(outcome.broken)
    sys.exit(1 if failed else 0)


def summary(outcome: Outcome, seconds: float) -> str:
    lines = [
        f"huggingface_hub {outcome.major}.x: {outcome.schedules} schedules, {outcome.kills} kills, "
        f"{outcome.requests} requests, {len(outcome.broken)} broken, {seconds:.0f} s"
    ]
    lines += [f"  {name}: {problem}" for name, problem in outcome.broken]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
