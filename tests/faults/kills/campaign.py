"""Many kills of one stage after another, and what came of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.faults.kills import points
from tests.faults.kills.bench import Bench, Broken
from tests.faults.kills.checks import after_the_kill, after_the_next_run
from tests.faults.kills.points import Point

HUNG_SECONDS = 3600.0
"""Until a run counts as hung; seconds on an idle machine, but strace stops every thread."""


@dataclass
class Tally:
    """One stage's kills."""

    stage: str
    kills: int = 0
    missed: int = 0  # the call was not made so often this time
    ours: int = 0  # of the kills, of the pipeline itself; others hit a worker or server
    lost_layers: int = 0  # at most, of one kill
    kept_parts: int = 0  # finished parts that a next run took over
    complete: int = 0  # the artifact was whole already
    seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[Point, str]] = field(default_factory=list)


def strike(bench: Bench, point: Point, tally: Tally) -> str:
    """One kill, and the next run; what became of it, in words."""
    bench.reset(point.stage)
    trace = bench.folder / "trace.txt"
    only = ("--only", point.stage)
    ended = bench.run(*only, under=points.killing(point, trace), seconds=HUNG_SECONDS)
    if not points.was_killed(trace):
        tally.missed += 1
        if ended.code != 0:
            raise Broken(f"nothing was killed and it ended with {ended.code}: {ended.err[-800:]}")
        return "not reached"
    tally.kills += 1
    tally.calls[point.call] += 1
    tally.ours += ended.code in (-9, 137)
    left = after_the_kill(bench, point.stage, ended)
    tally.lost_layers = max(tally.lost_layers, left.lost_layers)
    tally.kept_parts += len(left.parts) + len(left.layers)
    tally.complete += left.complete
    after_the_next_run(bench, point.stage, left, bench.run(*only, seconds=HUNG_SECONDS))
    return f"exit {ended.code}, {len(left.layers) + len(left.parts)} parts kept"


def count_calls(bench: Bench, stage: str) -> dict[str, int]:
    """What the stage calls when nothing disturbs it; remembered beside the clean run."""
    kept = bench.folder / f"calls-{stage}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    bench.reset(stage)
    trace = bench.folder / "trace.txt"
    ended = bench.run("--only", stage, under=points.tracer(trace))
    if ended.code != 0:
        raise Broken(f"{stage} ended with {ended.code} under strace: {ended.err[-800:]}")
    most = points.count(trace)
    kept.write_text(json.dumps(most))
    return most


def campaign(
    bench: Bench, kills: Mapping[str, int], seed: int, say: Callable[[str], None]
) -> list[Tally]:
    """So many kills of each stage; what breaks is said at once and kept."""
    tallies = []
    for stage, number in kills.items():
        tally, started = Tally(stage), time.monotonic()
        for point in points.draw(stage, count_calls(bench, stage), number, seed):
            try:
                say(f"  {point}: {strike(bench, point, tally)}")
            except Broken as problem:
                tally.broken.append((point, str(problem)))
                say(f"BROKEN {point}: {problem}")
        tally.seconds = time.monotonic() - started
        say(line(tally))
        tallies.append(tally)
    return tallies


def line(tally: Tally) -> str:
    """One row of the report."""
    return (
        f"{tally.stage}: {tally.kills} kills ({tally.ours} of the pipeline itself) at "
        f"{len(tally.calls)} kinds of calls, {tally.missed} missed, {tally.complete} after the "
        f"commit, at most {tally.lost_layers} layers lost, {tally.kept_parts} finished parts taken "
        f"over, {len(tally.broken)} broken, {tally.seconds:.0f} s"
    )
