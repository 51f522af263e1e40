"""What a person sees on a terminal and in a log."""

from __future__ import annotations

import errno
import json
import re
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantize.progress import BarView, LineView, Progress, describe
from quantize.protocol import Events


class Clock:
    """Stands in for the clock that measures spans."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Seen(LineView):
    """Keeps the time left of every step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.eta: list[float] = []
        super().__init__(self.lines.append, every_seconds=0)

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        self.eta.append(eta_seconds)


# --- time left ----------------------------------------------------------------------------------


def test_time_left_follows_the_rate_since_the_step_began(clock: Clock) -> None:
    view = Seen()
    progress = Progress(view)
    for done in (10, 20, 40):  # of 100, resumed at 10
        progress.step("layers", done, 100)
        clock.wait(5)
    # unknown; 10 in 5 s leave 80 → 40 s; 30 in 10 s leave 60 → 20 s
    assert view.eta == [-1.0, 40.0, 20.0]


def test_time_left_begins_anew_with_other_work_or_another_round(clock: Clock) -> None:
    view = Seen()
    progress = Progress(view)
    for what, done in (("a", 0), ("a", 5), ("b", 6), ("b", 7), ("a", 0), ("a", 5), ("a", 0)):
        progress.step(what, done, 10)
        clock.wait(1)
    assert view.eta == [-1, 1.0, -1, 3.0, -1, 1.0, -1]
    with progress.stage("next", 2, 3):
        progress.step("a", 8, 10)
    assert view.eta[-1] == -1


def test_time_left_is_unknown_without_a_total(clock: Clock) -> None:
    view = Seen()
    progress = Progress(view)
    for done in (0, 5, 9):
        progress.step("downloading", done, 0, "MB")
        clock.wait(1)
    assert view.eta == [-1, -1, -1]


# --- events of workers --------------------------------------------------------------------------


def test_events_are_shown(tmp_path: Path, clock: Clock) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.progress("layers", 1, 4, "layers")
    events.note("two rows were dropped\u2028and a half")
    events.emit("of a later version", value=1)
    view = Seen()
    progress = Progress(view)
    for line in (tmp_path / "events.jsonl").read_text().split("\n")[:-1]:
        progress.event(json.loads(line))
    assert view.eta == [-1]
    assert view.lines == ["      two rows were dropped\\u2028and a half"]


# --- lines --------------------------------------------------------------------------------------


def test_lines_in_a_log(clock: Clock) -> None:
    lines: list[str] = []
    progress = Progress(LineView(lines.append, every_seconds=10))
    with progress.stage("compress", 3, 9):
        progress.step("loading", 0, 4, "layers")  # a second has not passed
        clock.wait(1)
        progress.step("loading", 1, 4, "layers")
        clock.wait(9)
        progress.step("loading", 2, 4, "layers")  # nine seconds after the last
        clock.wait(1)
        progress.step("loading", 3, 4, "layers")
        progress.note("a line that stays")
        clock.wait(1)
        progress.step("saving", 5, 0, "MB")
    progress.close()
    assert lines == [
        "[3/9] compress",
        "      loading: 1/4 layers, 3 s left",  # 1 in 1 s
        "      loading: 3/4 layers, 4 s left",  # 3 in 11 s
        "      a line that stays",
        "      saving: 5 MB",
    ]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (("windows", 3, 64, "windows", -1.0), "windows: 3/64 windows"),
        (("smoke prompts", 1, 6, "", 2.4), "smoke prompts: 1/6, 2 s left"),
        (("server: starting", 12, 0, "s", -1.0), "server: starting: 12 s"),
        (("reading", 0.0123456, 5.2, "GB", 89.4), "reading: 0.01/5.20 GB, 89 s left"),
        (("rows", 1_234_567, 2_000_000, "", 90), "rows: 1234567/2000000, 2 min left"),
        (("a", 1.0, 2.0, "", 5399), "a: 1/2, 90 min left"),
        (("a", 1, 2, "", 5400), "a: 1/2, 1.5 h left"),
        (("a", 1, 2, "", 0.0), "a: 1/2, 0 s left"),
    ],
)
def test_describe(step: tuple[str, float, float, str, float], expected: str) -> None:
    assert describe(*step) == expected


# --- bars ---------------------------------------------------------------------------------------

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A terminal as wide as a person's, in memory."""

    def __init__(self) -> None:
        self.file = StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=100, _environ={})

    @property
    def raw(self) -> str:
        return self.file.getvalue()

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.raw)


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def test_bars_on_a_terminal(terminal: Terminal) -> None:
    view = BarView(terminal.console)
    progress = Progress(view)
    with progress.stage("compress", 3, 9):
        assert "[3/9] compress\n" in terminal.text
        progress.step("calibrating layers", 1, 4, "layers")
        view._bars.refresh()
        assert "calibrating layers" in terminal.text
        assert "1/4 layers" in terminal.text
        progress.step("saving", 12, 0, "MB")
        view._bars.refresh()
        assert "12 MB" in terminal.text
        progress.note("a line that stays")
        assert "      a line that stays\n" in terminal.text
    assert "\x1b[?25l" in terminal.raw  # the cursor was hidden
    progress.close()
    assert terminal.raw.rstrip("\r").rfind("\x1b[?25h") > terminal.raw.rfind("\x1b[?25l")


def test_time_left_on_the_bar(terminal: Terminal) -> None:
    view = BarView(terminal.console)
    view.stage("compress", "3/9")
    view.step("layers", 1, 4, "layers", 200.0)
    view._bars.refresh()
    view.close()
    assert "1/4 layers · 3 min left" in terminal.text


@pytest.mark.parametrize("name", ["mmlu[/bold]", "task [red]x", "{braces}", "re:.*[0-9]$"])
def test_names_are_shown_as_they_are(name: str, terminal: Terminal) -> None:
    view = BarView(terminal.console)
    view.stage("measure", "5/9")
    view.step(name, 1, 4, name, -1.0)
    view._bars.refresh()
    view.line(f"note on {name}")
    view.close()
    assert f"      {name} " in terminal.text
    assert f"1/4 {name}" in terminal.text
    assert f"note on {name}\n" in terminal.text


def test_a_closed_terminal_is_given_back_once(terminal: Terminal) -> None:
    view = BarView(terminal.console)
    view.close()
    view.close()
    assert terminal.raw.count("\x1b[?25h") == 1


class Gone:
    """A terminal that was closed."""

    def __getattr__(self, name: str) -> Any:
        def write(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        return write


def test_work_goes_on_when_nobody_looks(clock: Clock) -> None:
    progress = Progress(Gone())
    with progress.stage("compress", 1, 2):
        progress.step("layers", 1, 2)
        progress.note("a line")
    progress.close()
