"""Which faults a push is put under: every kind at every request, and pairs drawn by a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.hub_server import Fault, Seen

RETRY_AFTER_SECONDS = 7
LATE_SECONDS = 0.6
CLIENT_TIMEOUT_SECONDS = 0.4
"""What the client waits for an answer where a schedule is about answers that come late."""

BODY = {"kill-during", "cut-request", "damage"}
LISTS_OR_FILES = re.compile(r"/tree/|/resolve/|/_cdn/|/batch$|/preupload/")


@dataclass(frozen=True)
class Planned:
    """A fault at one request of a run, counted from 0."""

    kind: str
    index: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.index}"


@dataclass(frozen=True)
class Schedule:
    """Runs under faults; another one without any follows."""

    scenario: str
    runs: tuple[tuple[Planned, ...], ...]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(planned.kind for run in self.runs for planned in run)

    def __str__(self) -> str:
        return f"{self.scenario}:" + ";".join("+".join(map(str, run)) for run in self.runs)


SIMPLE: dict[str, dict[str, object]] = {
    "drop-before": {"drop": "before"},
    "drop-after": {"drop": "after"},
    "500": {"status": 500},
    "503": {"status": 503, "headers": {"Retry-After": str(RETRY_AFTER_SECONDS)}},
    "429": {"status": 429, "headers": {"Retry-After": str(RETRY_AFTER_SECONDS)}},
    "expired": {"expire_token": True},
    "cut-request": {"cut": "request"},
    "cut-answer": {"cut": "answer"},
    "slow": {"bytes_per_second": 2e6},
    "damage": {"corrupt": "request"},
    "lie": {"corrupt": "answer"},
    "moved": {"move_head": True},
    "quota": {"private_bytes": 1000},
}
KINDS = ("kill-before", "kill-during", "kill-after", "late", *SIMPLE)


def simple_fault(planned: Planned) -> Fault:
    """The fault of a kind that needs no process to kill."""
    return Fault(".", skip=planned.index, **SIMPLE[planned.kind])  # type: ignore[arg-type]


def applies(kind: str, request: Seen) -> bool:
    """Whether the kind makes a difference for such a request."""
    if kind in BODY:
        return request.body_bytes > 0
    if kind == "lie":
        return LISTS_OR_FILES.search(request.path) is not None and request.method != "HEAD"
    return True


def systematic(scenario: str, happy: Sequence[Seen]) -> Iterator[Schedule]:
    """Every kind at every request of the run without faults, and the first after it."""
    for index, request in enumerate(happy):
        for kind in KINDS:
            if applies(kind, request):
                yield Schedule(scenario, ((Planned(kind, index),),))


def drawn(scenario: str, requests: int, count: int, seed: int) -> Iterator[Schedule]:
    """`count` pairs: two faults of one run, or one in each of two runs."""
    draw = random.Random(f"{scenario} {seed}")
    for _ in range(count):
        first, second = (
            Planned(draw.choice(KINDS), index) for index in sorted(draw.sample(range(requests), 2))
        )
        together = draw.random() < 0.5
        runs = ((first, second),) if together else ((first,), (second,))
        yield Schedule(scenario, runs)
