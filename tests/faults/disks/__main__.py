"""Full, failing and slow disks: ``python -m tests.faults.disks [--steps 20] [--only TEXT]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.disks import failing, full
from tests.faults.kills.bench import Bench


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.disks", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="sizes of the full disk; 0: none")
    parser.add_argument("--only", default="", help="failing calls whose name has this text")
    parser.add_argument("--folder", type=Path, help="kept, with its undisturbed run, for next time")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    broken = 0
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments.folder or Path(temporary), measured=False)
        bench.prepare()
        if reason := failing.why_not():
            say(f"failing disks are skipped: {reason}")
        else:
            broken += failing.campaign(bench, say, arguments.only)
        if reason := full.why_not():
            say(f"full disks are skipped: {reason}")
        elif arguments.steps:
            broken += full.campaign(bench, arguments.steps, say)
    say(f"{broken} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
