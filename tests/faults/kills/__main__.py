"""Kill runs at system calls: ``python -m tests.faults.kills [--kills 500] [--stage compress]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.kills.bench import Bench
from tests.faults.kills.campaign import campaign
from tests.faults.kills.points import why_not

WEIGHTS = {"compress": 6, "measure": 1}
"""Shares of the kills, by kind; others 3. A measurement costs a minute or two for each kill."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="over all stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", action="append", help="only these")
    parser.add_argument("--folder", type=Path, help="kept, with its undisturbed run, for next time")
    parser.add_argument("--unmeasured", action="store_true", help="a recipe without measurements")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        bench = Bench(folder, measured=not arguments.unmeasured)
        bench.prepare()
        shares = {
            stage: WEIGHTS.get(bench.stages[stage][0], 3)
            for stage in bench.stages
            if arguments.stage is None or stage in arguments.stage
        }
        whole = sum(shares.values())
        kills = {stage: -(-arguments.kills * share // whole) for stage, share in shares.items()}
        tallies = campaign(bench, kills, arguments.seed, lambda text: print(text, flush=True))
    total, broken = sum(t.kills for t in tallies), sum(len(t.broken) for t in tallies)
    print(f"{total} kills, {broken} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
