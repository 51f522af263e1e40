"""Which scheme for which linear: the smallest summed error that a budget allows.

Choosing one option for every unit of a sensitivity record is a multiple-choice knapsack::

    minimise    sum_u error[u, choice(u)]
    subject to  sum_u bytes[u, choice(u)] <= budget

which :func:`solve` hands to HiGHS (``scipy.optimize.milp``), a branch-and-cut solver that proves
its optimum. This module is pure: it opens no file and knows no recipe.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from quantize.errors import ToolError, UsageError
from quantize.sensitivity import BF16, Choice, Option, Unit

FRONTIER_POINTS = 15


@dataclass(frozen=True)
class Assignment:
    """A choice for every unit and what it comes to. `parameters` are those of the units alone."""

    options: Mapping[str, Option]  # by the unit's name
    bytes: int
    error: float
    parameters: int
    shares: Mapping[Choice, float]  # of the parameters, smallest scheme first; they add up to 1

    @property
    def bits(self) -> float:
        """Average bits a quantizable parameter, scales and zero points included."""
        return self.bytes * 8 / self.parameters


def assignment(chosen: Iterable[tuple[Unit, Option]]) -> Assignment:
    """Sums and shares of a choice for every unit."""
    pairs = list(chosen)
    total = sum(unit.parameters for unit, _ in pairs)
    parameters: dict[Choice, int] = defaultdict(int)
    size: dict[Choice, int] = defaultdict(int)
    for unit, option in pairs:
        parameters[option.choice] += unit.parameters
        size[option.choice] += option.bytes
    by_bits = sorted(parameters, key=lambda c: (size[c] / parameters[c], c.label))
    return Assignment(
        options={unit.name: option for unit, option in pairs},
        bytes=sum(option.bytes for _, option in pairs),
        error=math.fsum(option.error for _, option in pairs),
        parameters=total,
        shares={choice: parameters[choice] / total for choice in by_bits},
    )


def smallest(among: Sequence[Unit]) -> Assignment:
    """Every unit in its smallest option."""
    return assignment((unit, unit.options[0]) for unit in among)


def best(among: Sequence[Unit]) -> Assignment:
    """Every unit in the smallest of its options with the least error."""
    return assignment((unit, _worthwhile(unit)[-1]) for unit in among)


def uniform(among: Sequence[Unit]) -> dict[Choice, Assignment]:
    """Every choice that all units have, for all of them; smallest first."""
    offered = [{option.choice: option for option in unit.options} for unit in among]
    found = {
        choice: assignment((unit, own[choice]) for unit, own in zip(among, offered, strict=True))
        for choice in offered[0]
        if all(choice in own for own in offered)
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].bytes, item[0].label)))


def _worthwhile(unit: Unit) -> list[Option]:
    """Options that no smaller or equal one beats, smallest first, each with less error."""
    kept: list[Option] = []
    for option in unit.options:
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def solve(among: Sequence[Unit], budget_bytes: int) -> Assignment:
    """The assignment of at most `budget_bytes` bytes with the least summed error.

    Optimal up to 1e-10 of the largest possible sum, and always the same: HiGHS is deterministic,
    an option that a smaller one beats is never taken, and units with equal options get what is
    chosen for them in the units' order, the largest first. Raises ValueError if nothing is small
    enough.
    """
    if smallest(among).bytes > budget_bytes:
        raise ValueError(f"{budget_bytes} bytes are less than the smallest assignment")
    if best(among).bytes <= budget_bytes:
        return best(among)
    options = [_worthwhile(unit) for unit in among]
    limit = budget_bytes
    refused: list[list[int]] = []
    while True:
        picks = _knapsack(options, limit, refused)
        over = sum(own[pick].bytes for own, pick in zip(options, picks, strict=True)) - budget_bytes
        if over <= 0:
            break
        # The solver takes a number within 1e-6 of a whole one for it, so that large constraints are
        # not kept to the byte; here bytes are counted exactly.
        if len(refused) < MOST_REFUSED:
            refused.append(picks)
        else:
            limit -= over
    return assignment(_in_order(among, options, picks))


SCALE = 1e4
"""What the largest possible error becomes for the solver, whose absolute gap is 1e-6."""

MOST_REFUSED = 30
"""Choices just above the budget that are forbidden one by one, before the limit is lowered."""


def _knapsack(
    options: Sequence[Sequence[Option]], limit: int, refused: Sequence[Sequence[int]]
) -> list[int]:
    """Index of the option to take of each unit: at most `limit` bytes within HiGHS's tolerance.

    `refused` are earlier answers that were too large, which forbids all that are larger, too.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [option for own in options for option in own]
    lengths = [len(own) for own in options]
    owner = np.repeat(np.arange(len(options)), lengths)
    added = np.array([option.bytes - own[0].bytes for own in options for option in own])
    # Numbers near 1 keep the solver's arithmetic exact: bytes are multiples of something large.
    unit_bytes = int(np.gcd.reduce(added)) or 1
    room = (limit - sum(own[0].bytes for own in options)) // unit_bytes
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint((added // unit_bytes)[np.newaxis], -np.inf, room),
    ]
    index = np.concatenate([np.arange(length) for length in lengths])
    for picks in refused:  # one of the units above its smallest option must take less
        above = np.array(picks) > 0
        as_large = above[owner] & (index >= np.repeat(picks, lengths))
        constraints.append(LinearConstraint(as_large[np.newaxis], -np.inf, above.sum() - 1))
    errors = np.array([option.error for option in flat])
    largest = math.fsum(own[0].error for own in options)
    with _silence():
        result = milp(
            errors * (SCALE / largest),
            constraints=constraints,
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None or result.status != 0:
        raise ToolError(f"HiGHS found no optimum: {result.message}", "please report this")
    return [int(np.argmax(own)) for own in np.split(result.x, np.cumsum(lengths)[:-1])]


@contextmanager
def _silence() -> Iterator[None]:
    """Send what C code writes to standard output nowhere.

    HiGHS has a debug line that no option turns off; it would stand in the middle of our JSON.
    """
    flush = ctypes.CDLL(None).fflush
    flush(None)
    standard_output = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(standard_output, 1)
        os.close(standard_output)


def _in_order(
    among: Sequence[Unit], options: Sequence[Sequence[Option]], picks: Sequence[int]
) -> list[tuple[Unit, Option]]:
    """Units with equal options are interchangeable: the first of them get the largest choices."""
    alike: dict[tuple[tuple[int, float, str], ...], list[int]] = defaultdict(list)
    for index, own in enumerate(options):
        alike[tuple(option.order for option in own)].append(index)
    chosen = [own[pick] for own, pick in zip(options, picks, strict=True)]
    for indices in alike.values():
        sizes = sorted((picks[index] for index in indices), reverse=True)
        for index, pick in zip(indices, sizes, strict=True):
            chosen[index] = options[index][pick]
    return list(zip(among, chosen, strict=True))


def frontier(among: Sequence[Unit], points: int = FRONTIER_POINTS) -> list[Assignment]:
    """Optima for `points` budgets from the smallest assignment to the best, smallest first.

    Budgets grow by a constant factor: what a bit buys shrinks as there are more of them. Budgets
    with the same optimum are one point.
    """
    low, high = smallest(among).bytes, best(among).bytes
    budgets = [int(low * (high / low) ** (i / (points - 1))) for i in range(points - 1)]
    found = [solve(among, max(low, budget)) for budget in budgets] + [best(among)]
    return [found[0], *(new for old, new in pairwise(found) if new.options != old.options)]


@dataclass(frozen=True)
class Budget:
    """What the user allows: bits a quantizable parameter, or bytes of all weights."""

    text: str  # as typed, without white space
    bits: float | None = None
    total_bytes: int | None = None

    @property
    def slug(self) -> str:
        """For names of files and recipes: `4.5bits`, `3.2gb`."""
        return self.text.lower()

    def for_units(self, parameters: int, rest_bytes: int) -> int:
        """Bytes that the units may take; `rest_bytes` is what the other tensors take anyway."""
        if self.bits is not None:
            return math.floor(self.bits * parameters / 8)
        assert self.total_bytes is not None
        return self.total_bytes - rest_bytes


_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(bits?|B|[kMGT]B|[KMGT]iB)", re.IGNORECASE)


def parse_budget(text: str) -> Budget:
    """`4.5bits`, `3.2GB` (powers of 1000), `350MiB` (of 1024); a UsageError for anything else."""
    found = _BUDGET.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise UsageError(
            f"--budget {text}: expected bits a parameter or the size of all weights",
            "write for example --budget 4.5bits, --budget 3.2GB or --budget 350MiB",
        )
    number, unit = found[1], found[2].lower()
    if unit.startswith("bit"):
        return Budget(f"{number}bits", bits=float(number))
    power = "bkmgt".index(unit[0])
    base = 1024 if "i" in unit else 1000
    return Budget(f"{number}{found[2]}", total_bytes=math.floor(float(number) * base**power))


@dataclass(frozen=True)
class Found:
    """Everything that a search has to say, for the table, the plot and the recipe."""

    among: tuple[Unit, ...]
    budget: Budget
    chosen: Assignment
    frontier: tuple[Assignment, ...]  # smallest first
    uniform: Mapping[Choice, Assignment]  # one choice for all, for comparison
    rest_bytes: int  # of the tensors that are no part of the problem
    tokens: int  # that the errors were measured on

    @property
    def linears(self) -> int:
        """How many linears the units hold."""
        return sum(len(unit.linears) for unit in self.among)


def search(among: tuple[Unit, ...], budget: Budget, rest_bytes: int, tokens: int) -> Found:
    """The optimum for the budget, the frontier around it and the uniform assignments."""
    chosen = choose(among, budget, rest_bytes)
    return Found(among, budget, chosen, tuple(frontier(among)), uniform(among), rest_bytes, tokens)


def choose(among: Sequence[Unit], budget: Budget, rest_bytes: int) -> Assignment:
    """The optimum for a budget.

    A UsageError that names the smallest budget if there is none, and one that names the largest
    sensible budget if everything would stay in BF16.
    """
    low, high = smallest(among), best(among)
    room = budget.for_units(low.parameters, rest_bytes)
    if room < low.bytes:
        raise UsageError(
            f"--budget {budget.text} is too small: no choice takes less than "
            f"{_as_budget(low, budget, rest_bytes, math.ceil)}",
            "raise the budget, or allow smaller schemes with --schemes",
        )
    chosen = solve(among, room)
    if set(chosen.shares) == {BF16}:
        raise UsageError(
            f"--budget {budget.text} leaves everything in BF16, which takes "
            f"{_as_budget(high, budget, rest_bytes, math.floor)}",
            "lower the budget",
        )
    return chosen


def _as_budget(
    found: Assignment, budget: Budget, rest_bytes: int, whole: Callable[[float], int]
) -> str:
    """Size of an assignment in the budget's own unit, rounded so that it can be typed."""
    if budget.bits is not None:
        return f"{whole(found.bits * 1000) / 1000}bits"
    return f"{found.bytes + rest_bytes}B"
