"""Events → bars on a terminal, lines in a log, and `status.json`.

Stages and workers say what they do through :class:`Progress`; who shows it is decided once, by the
command line. :mod:`quantize.status` writes `status.json`, for schedulers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from quantize import stop
from quantize.printable import printable
from quantize.status import Status


class View(Protocol):
    """Shows progress to a person."""

    def stage(self, title: str, position: str) -> None:
        """A stage has begun; `position` is like ``3/9``."""

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        """Work goes on inside the stage; a negative `eta_seconds` means not known yet."""

    def line(self, text: str) -> None:
        """Something worth a line that stays."""

    def close(self) -> None:
        """The run is over; give the terminal back."""


@dataclass
class Progress:
    """Where stages, workers and servers report, and the only caller of the view.

    The view may be a terminal that is gone: then nobody looks, and the work goes on.
    """

    view: View
    status: Status | None = None
    _step: tuple[str, float, float] = ("", 0.0, 0.0)  # what, when it began, done when it began
    _done: float = 0.0  # of the last step

    @contextmanager
    def stage(self, stage_id: str, index: int, count: int) -> Iterator[None]:
        """Everything reported inside belongs to this stage."""
        self._step = ("", 0.0, 0.0)
        with suppress(OSError):
            self.view.stage(stage_id, f"{index}/{count}")
        if self.status is not None:
            self.status.stage(stage_id, f"{index}/{count}")
        yield

    def step(self, what: str, done: float, total: float, unit: str = "") -> None:
        """`done` of `total` `unit`s of `what`; the time left follows from the rate so far."""
        stop.check()
        now = time.monotonic()
        if self._step[0] != what or done < self._done:
            self._step = (what, now, done)
        self._done = done
        elapsed, gained = now - self._step[1], done - self._step[2]
        eta = (total - done) * elapsed / gained if gained > 0 and total > 0 else -1.0
        with suppress(OSError):
            self.view.step(printable(what), done, total, unit, eta)
        inside: dict[str, Any] = {"what": what, "done": done, "total": total, "unit": unit}
        if total > 0:  # what is not known is not there
            inside["percent"] = round(100 * done / total)
        if eta >= 0:
            inside["eta_seconds"] = round(eta)
        if self.status is not None:
            self.status.step(inside)

    def note(self, text: str) -> None:
        """A line that stays."""
        with suppress(OSError):
            self.view.line(printable(text))

    def event(self, event: dict[str, Any]) -> None:
        """One line of a worker's events file; kinds that this version does not know are skipped."""
        if event["kind"] == "progress":
            self.step(event["what"], event["done"], event["total"], event["unit"])
        elif event["kind"] == "note":
            self.note(event["text"])

    def close(self) -> None:
        """The run is over; give the terminal back."""
        with suppress(OSError):
            self.view.close()


class LineView:
    """One line a stage, and one every `every_seconds` inside it: for logs and batch jobs."""

    def __init__(self, write: Any, every_seconds: float = 10.0) -> None:
        self._write = write  # called with one line of text
        self._every = every_seconds
        self._last = 0.0
        self._what = ""

    def stage(self, title: str, position: str) -> None:
        """Write the stage's title."""
        self._write(f"[{position}] {title}")
        self._last, self._what = time.monotonic(), ""

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        """Write a line when the last is old enough, or the work is another."""
        now = time.monotonic()
        if now - self._last < (self._every if what == self._what else 1.0):
            return
        self._last, self._what = now, what
        self._write("      " + describe(what, done, total, unit, eta_seconds))

    def line(self, text: str) -> None:
        """Write the line."""
        self._write(f"      {text}")

    def close(self) -> None:
        """Nothing to give back."""


class BarView:
    """Stage titles that stay and one live bar below them, on a terminal."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._console = console
        self._bars = RichProgress(
            TextColumn("      {task.description}", markup=False),  # names may hold brackets
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bars.add_task("", total=None, state="", visible=False)
        self._bars.start()

    def stage(self, title: str, position: str) -> None:
        """Print the stage's title and reset the bar."""
        self._console.print(f"[bold]\\[{position}] {title}[/bold]", highlight=False)
        self._bars.reset(self._task, total=None, description=title, state="", visible=True)

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        """Move the bar."""
        left = f" · {_duration(eta_seconds)} left" if eta_seconds >= 0 else ""
        self._bars.update(
            self._task,
            description=what,
            completed=done,
            total=total if total > 0 else None,
            state=_amount(done, total, unit) + left,
            visible=True,
        )

    def line(self, text: str) -> None:
        """Print the line above the bar."""
        self._console.print(f"      {text}", highlight=False, markup=False)

    def close(self) -> None:
        """Stop the live display."""
        self._bars.stop()


def describe(what: str, done: float, total: float, unit: str, eta_seconds: float) -> str:
    """``calibrating layers: 3/4 layers, 20 s left``."""
    left = f", {_duration(eta_seconds)} left" if eta_seconds >= 0 else ""
    return f"{what}: {_amount(done, total, unit)}{left}"


def _amount(done: float, total: float, unit: str) -> str:
    counts = [done, total] if total > 0 else [done]
    digits = 0 if all(count == int(count) for count in counts) else 2
    return f"{'/'.join(f'{count:.{digits}f}' for count in counts)} {unit}".strip()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
