"""All schedules of one major, or a fixed part of them, on a few benches at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.bench import SCENARIOS, Bench
from tests.faults.schedules import Schedule, drawn, systematic
from tests.faults.trial import Broken, happy_path, run_schedule

KILLED_EVERYWHERE = ("update", "pull-request")
"""Scenarios whose kills at every request are in every part."""


@dataclass(frozen=True)
class Part:
    """Which schedules: every `every`-th of the systematic ones with all kills, and drawn pairs."""

    every: int = 1
    pairs: int = 100  # for each scenario
    seed: int = 0
    only: str = ""  # those whose name has this text


@dataclass
class Outcome:
    """What a campaign found."""

    major: int
    schedules: int = 0
    requests: int = 0
    kills: int = 0  # SIGKILLs that were planned
    broken: list[tuple[str, str]] = field(default_factory=list)

    def add(self, schedule: Schedule, requests: int, problem: str) -> None:
        self.schedules += 1
        self.requests += requests
        self.kills += sum(each.kind.startswith("kill") for run in schedule.runs for each in run)
        if problem:
            self.broken.append((str(schedule), problem))


def run_campaign(major: int, folder: Path, part: Part, workers: int = 2) -> Outcome:
    """Run the part's schedules; files go into `folder`."""
    outcome, lock = Outcome(major), threading.Lock()
    waiting: queue.SimpleQueue[Schedule] = queue.SimpleQueue()

    def work(bench: Bench) -> None:
        while True:
            try:
                schedule = waiting.get_nowait()
            except queue.Empty:
                return
            requests, problem = 0, ""
            try:
                requests = run_schedule(bench, schedule)
            except Broken as error:
                problem = str(error)
            except Exception as error:  # a mistake in here must not look like a pass
                problem = repr(error)
            with lock:
                outcome.add(schedule, requests, problem)

    with ExitStack() as stack:
        benches = []
        for number in range(workers):
            place = folder / f"worker-{number}"
            place.mkdir()
            benches.append(stack.enter_context(Bench(major, place)))
        for schedule in schedules_of(benches[0], part):
            waiting.put(schedule)
        threads = [threading.Thread(target=work, args=(bench,)) for bench in benches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    outcome.broken.sort()
    return outcome


def schedules_of(bench: Bench, part: Part) -> list[Schedule]:
    """The part's schedules, from the requests that each scenario makes without faults."""
    found: list[Schedule] = []
    for name in SCENARIOS:
        happy = happy_path(bench, name)
        found += _thinned(list(systematic(name, happy)), part.every)
        found += drawn(name, len(happy), part.pairs, part.seed)
    return [schedule for schedule in found if part.only in str(schedule)]


def _thinned(schedules: Sequence[Schedule], every: int) -> Iterator[Schedule]:
    for number, schedule in enumerate(schedules):
        kills = any(kind.startswith("kill") for kind in schedule.kinds)
        if number % every == 0 or (kills and schedule.scenario in KILLED_EVERYWHERE):
            yield schedule
