"""Two runs of one recipe on one store, one of them killed: ``python -m tests.faults.races``.

Whichever is killed and whenever, the other ends well, and the store has the undisturbed artifacts;
a stage is made twice only if its first maker was killed in it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from quantize.store import Artifact
from tests.faults.kills.bench import Bench, Broken
from tests.faults.kills.checks import difference

TIMED = {"quantize/record.json", "quantize/provenance.json"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.races", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept, with its undisturbed run, for next time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments.folder or Path(temporary), measured=False)
        bench.prepare()
        chance, broken = random.Random(arguments.seed), 0
        for number in range(arguments.rounds):
            try:
                print(f"round {number}: {race(bench, chance)}", flush=True)
            except Broken as problem:
                broken += 1
                print(f"BROKEN round {number}: {problem}", flush=True)
    print(f"{arguments.rounds} rounds, {broken} broken")
    sys.exit(1 if broken else 0)


def race(bench: Bench, chance: random.Random, most_seconds: float = 25.0) -> str:
    """Start two, kill one after a while, wait for the other, check; what happened, in words."""
    bench.reset("fetch")
    runs = [start(bench) for _ in range(2)]
    after, victim = chance.uniform(0.5, most_seconds), chance.randrange(2)
    time.sleep(after)
    runs[victim].kill()
    out, err = runs[1 - victim].communicate(timeout=900)
    runs[victim].communicate()
    bench.nobody_survives()
    if runs[1 - victim].returncode != 0:
        raise Broken(f"the other run ended with {runs[1 - victim].returncode}: {err[-1500:]}")
    states = Counter(stage["state"] for stage in json.loads(out)["stages"])
    for name, place in bench.stages.items():
        artifact = bench.store.get(*place)
        if artifact is None or artifact.damage(hash_files=True):
            raise Broken(f"{name} is not whole")
        reference = bench.reference(name)
        if (
            found := published(reference, artifact)
            if name == "publish"
            else difference(reference, artifact)
        ):
            raise Broken(f"{name} is another artifact: {found}")
    left = [path for path in bench.store.leftovers() if ".staging" in path.parts]
    if left:
        raise Broken(f"scratch is left: {left}")
    return f"run {victim} killed after {after:.1f} s; the other made {states['ran']} stages"


def published(one: Artifact, other: Artifact) -> list[str]:
    """Published files that differ, but for those that say how long the stages took.

    All stages were made anew, so the record and what has its sha256 in it tell other times.
    """
    listed = [
        {entry["name"]: entry["sha256"] for entry in artifact.json("published.json")["files"]}
        for artifact in (one, other)
    ]
    told = sorted(listed[0].keys() ^ listed[1].keys())
    same = listed[0].keys() & listed[1].keys()
    return told + sorted(n for n in same - TIMED if listed[0][n] != listed[1][n])


def start(bench: Bench) -> subprocess.Popen[str]:
    """One run, not waited for."""
    return subprocess.Popen(
        [*bench.command("run", bench.store), "--json"],
        cwd=bench.folder,
        env=bench.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


if __name__ == "__main__":
    main()
