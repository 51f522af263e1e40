"""Run all schedules: ``python -m tests.faults [--major 1] [--pairs 100] [--only TEXT]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Outcome, run_campaign


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--major", type=int, action="append", help="of huggingface_hub; both")
    parser.add_argument("--pairs", type=int, default=100, help="drawn pairs for each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="schedules whose name has this text")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    failed = False
    for major in arguments.major or (1, 2):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_campaign(
                major,
                Path(folder),
                pairs=arguments.pairs,
                seed=arguments.seed,
                only=arguments.only,
                workers=arguments.workers,
            )
        report(outcome, time.monotonic() - started)
        failed = failed or bool(outcome.broken)
    sys.exit(1 if failed else 0)


def report(outcome: Outcome, seconds: float) -> None:
    print(
        f"huggingface_hub {outcome.major}.x: {outcome.schedules} schedules, "
        f"{outcome.requests} requests, {outcome.kills} kills, {len(outcome.broken)} broken, "
        f"{seconds:.0f} s"
    )
    for name, problem in outcome.broken:
        print(f"  {name}: {problem}")


if __name__ == "__main__":
    main()
