"""All schedules of one major, on a few benches at a time."""

from __future__ import annotations

import itertools
import queue
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.bench import SCENARIOS, Bench
from tests.faults.schedules import Schedule, drawn, systematic
from tests.faults.trial import Broken, happy_path, run_schedule


@dataclass
class Outcome:
    """What a campaign found."""

    major: int
    schedules: int = 0
    requests: int = 0
    kills: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def run_campaign(
    major: int,
    folder: Path,
    *,
    pairs: int,
    seed: int = 0,
    only: str = "",
    every: int = 1,
    workers: int = 2,
) -> Outcome:
    """Every `every`-th systematic schedule and `pairs` drawn ones for each scenario."""
    outcome, lock = Outcome(major), threading.Lock()
    waiting: queue.SimpleQueue[Schedule] = queue.SimpleQueue()

    def work(bench: Bench) -> None:
        while True:
            try:
                schedule = waiting.get_nowait()
            except queue.Empty:
                return
            problem, requests = "", 0
            try:
                requests = run_schedule(bench, schedule)
            except Broken as error:
                problem = str(error)
            with lock:
                outcome.schedules += 1
                outcome.requests += requests
                outcome.kills += sum(
                    each.kind.startswith("kill") for run in schedule.runs for each in run
                )
                if problem:
                    outcome.broken.append((str(schedule), problem))

    with ExitStack() as stack:
        benches = []
        for number in range(workers):
            place = folder / f"worker-{number}"
            place.mkdir()
            benches.append(stack.enter_context(Bench(major, place)))
        for schedule in plan(benches[0], pairs, seed, every):
            if only in str(schedule):
                waiting.put(schedule)
        threads = [threading.Thread(target=work, args=(bench,)) for bench in benches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    outcome.broken.sort()
    return outcome


def plan(bench: Bench, pairs: int, seed: int, every: int) -> list[Schedule]:
    """The schedules, from the requests that each scenario's push makes without faults."""
    found: list[Schedule] = []
    for name in SCENARIOS:
        happy = happy_path(bench, name)
        found += itertools.islice(systematic(name, happy), 0, None, every)
        found += drawn(name, len(happy), pairs, seed)
    return found
