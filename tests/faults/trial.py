"""One schedule from its start to its end, and what must hold at every moment of it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from tests.faults.clients import ROOT, python_for
from tests.faults.schedules import (
    CLIENT_TIMEOUT_SECONDS,
    LATE_SECONDS,
    RETRY_AFTER_SECONDS,
    Planned,
    Schedule,
    simple_fault,
)
from tests.faults.versions import (
    FIRST,
    LIMITS,
    SECOND,
    UPLOADED_ALONE_BYTES,
    Version,
    write_version,
)
from tests.hub_server import Account, Fault, Hub, HubServer, Seen
from tests.hub_server.repos import Repo

TOKEN = "hf_canary+Token/ThatMustNot=Leak"
REPO = "ann/model"
MESSAGE = "Publish model"
OBJECT = re.compile(r"/_lfs/ann/model/([0-9a-f]{64})")


class Broken(AssertionError):
    """What must hold does not; the message says after which request."""


@dataclass(frozen=True)
class Run:
    """How one push ended."""

    status: int  # exit code, or minus the signal
    result: Mapping[str, Any]
    requests: tuple[Seen, ...]

    def sent(self) -> Counter[str]:
        """Bytes of large objects that arrived, by sha256."""
        sent: Counter[str] = Counter()
        for seen in self.requests:
            match = OBJECT.match(seen.path)
            if match and seen.method == "PUT":
                sent[match[1]] += seen.body_bytes
        return sent


@dataclass(frozen=True)
class Scenario:
    """Where a push begins: `with_first` version on main or no repository at all."""

    with_first: bool
    target: Mapping[str, Any] = field(default_factory=lambda: {"repo": REPO})


SCENARIOS: dict[str, Scenario] = {
    "update": Scenario(with_first=True),
    "new": Scenario(with_first=False),
}


class Bench:
    """A Hub, a driver of one major and the two versions, for many schedules one after another."""

    def __init__(self, major: int, folder: Path) -> None:
        self.major, self.folder = major, folder
        self.first = write_version(folder / "first", FIRST)
        self.second = write_version(folder / "second", SECOND)
        self.server = HubServer(Hub({TOKEN: Account("ann")}, LIMITS), keep_bodies=True)
        self._starts: dict[str, Hub] = {}
        self._pid: int | None = None
        self._begun = threading.Event()

    def __enter__(self) -> Bench:
        self.server.__enter__()
        variables = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / "home"),
            "HF_ENDPOINT": self.server.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._driver = subprocess.Popen(
            [str(python_for(self.major)), "-m", "tests.faults.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=self.folder,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        self._driver.wait(30)
        self.server.__exit__(kind, value, _)

    def push(self, version: Version, scenario: Scenario, *, timeout: float | None = None) -> Run:
        """One push in a process of its own, to its end."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self.server.seen.clear()
        self._begun.clear()
        result, output = self.folder / "result.json", self.folder / "output.txt"
        result.unlink(missing_ok=True)
        settings: dict[str, Any] = {"hub_push.UPLOADED_ALONE_BYTES": UPLOADED_ALONE_BYTES}
        if timeout is not None:
            settings["hub_client.TIMEOUT_SECONDS"] = timeout
        job = {
            "endpoint": self.server.endpoint,
            "folder": str(version.folder),
            "target": dict(scenario.target),
            "message": MESSAGE,
            "settings": settings,
            "result": str(result),
            "output": str(output),
        }
        self._driver.stdin.write(json.dumps(job) + "\n")
        self._driver.stdin.flush()
        self._pid = json.loads(self._driver.stdout.readline())["pid"]
        self._begun.set()
        status = json.loads(self._driver.stdout.readline())["status"]
        self.server.settle()
        said = json.loads(result.read_text()) if result.exists() else {}
        return Run(status, said, tuple(self.server.seen))

    def begin(self, name: str) -> None:
        """The Hub as the scenario finds it."""
        if name not in self._starts:
            self.server.hub = Hub({TOKEN: Account("ann")}, LIMITS)
            if SCENARIOS[name].with_first:
                run = self.push(self.first, SCENARIOS["new"])
                assert run.status == 0, run.result
            self._starts[name] = self.server.hub
        self.server.hub = self._starts[name].copy()
        self.server.faults.clear()
        (self.folder / "output.txt").unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL for the pushing process, at once."""
        self._begun.wait(10)
        assert self._pid is not None
        os.kill(self._pid, signal.SIGKILL)

    def fault(self, planned: Planned) -> Fault:
        match planned.kind:
            case "kill-before":
                return Fault(".", skip=planned.index, before=self.kill, drop="before")
            case "kill-during":
                return Fault(".", skip=planned.index, during=self.kill, cut="request")
            case "kill-after":
                return Fault(".", skip=planned.index, after=self.kill, drop="after")
            case "late":  # it takes effect when the client has given up waiting
                return Fault(".", skip=planned.index, before=lambda: time.sleep(LATE_SECONDS))
        return simple_fault(planned)

    def repo(self) -> Repo | None:
        return self.server.hub.repos.get(("model", REPO))


def happy_path(bench: Bench, name: str) -> Sequence[Seen]:
    """The requests of a push without faults, which must end well."""
    bench.begin(name)
    run = bench.push(bench.second, SCENARIOS[name])
    _expect(run.status == 0, f"a push without faults ends with {run.status}: {run.result}")
    return run.requests


def run_schedule(bench: Bench, schedule: Schedule) -> int:
    """Raise Broken when something does not hold; the number of requests otherwise."""
    bench.begin(schedule.scenario)
    scenario = SCENARIOS[schedule.scenario]
    watch = _Watch(bench, schedule)
    bench.server.observers[:] = [watch]
    limits, hub = bench.server.hub.limits, bench.server.hub
    requests: list[Seen] = []
    complete: set[str] = set()
    timeout = CLIENT_TIMEOUT_SECONDS if "late" in schedule.kinds else None
    try:
        for planned in (*schedule.runs, ()):
            bench.server.faults[:] = [bench.fault(each) for each in planned]
            run = bench.push(bench.second, scenario, timeout=timeout if planned else None)
            requests += run.requests
            _check_end(bench, planned, run, schedule)
            _check_bytes(bench, planned, run, complete)
            repo = bench.repo()
            complete = set(repo.objects) if repo else set()
            hub.expired.clear()
            limits.private_bytes = {}
    finally:
        bench.server.observers.clear()
    if watch.problem:
        raise Broken(watch.problem)
    _check_result(bench, schedule)
    _check_leaks(bench, requests)
    return len(requests)


class _Watch:
    """Looks at main after every request."""

    def __init__(self, bench: Bench, schedule: Schedule) -> None:
        self._bench, self._damaged = bench, "damage" in schedule.kinds
        self._scenario = SCENARIOS[schedule.scenario]
        self.problem = ""

    def __call__(self, request: str) -> None:
        repo = self._bench.repo()
        if repo is None or self.problem:
            return
        tree = repo.tree("main")
        bench = self._bench
        if bench.second.is_in(tree):
            return
        old = bench.first.is_in(tree) if self._scenario.with_first else _nothing(tree)
        if not old and not (self._damaged and "/commit/" in request):
            self.problem = f"main is neither the old version nor the new one after {request}"


def _nothing(tree: Mapping[str, object]) -> bool:
    return set(tree) <= {".gitattributes", "theirs.txt"}


ENDS = {"expired": {0, 5, 75}, "moved": {0, 6, 75}, "quota": {0, 4, 75}}
"""Exit codes that a run under a fault may have; for others, done or run it again."""


def _check_end(bench: Bench, planned: Sequence[Planned], run: Run, schedule: Schedule) -> None:
    kinds = {each.kind for each in planned}
    if not planned:
        _expect(run.status == 0, f"the run without faults ends with {run.status}: {run.result}")
    if run.status == -signal.SIGKILL:
        _expect(any(kind.startswith("kill") for kind in kinds), "nobody killed it")
        return
    _expect(bool(run.result), f"it crashed with {run.status}")
    repo = bench.repo()
    if run.status == 0:
        _expect(
            repo is not None and bench.second.is_in(repo.tree("main")),
            "it says that it is done, and main is not the new version",
        )
    allowed = {0, 75}.union(*(ENDS.get(kind, set()) for kind in kinds))
    if "damage" in kinds or "lie" in kinds:  # what a Hub that is broken says has no one name
        allowed |= {1, 3, 6}
    _expect(run.status in allowed, f"ended with {run.status}: {run.result.get('text')}")
    if {"503", "429"} & kinds and len(planned) == 1:
        _expect(
            max(run.result["waits"], default=0) >= RETRY_AFTER_SECONDS,
            f"Retry-After was not waited for: {run.result['waits']}",
        )


def _check_bytes(bench: Bench, planned: Sequence[Planned], run: Run, complete: set[str]) -> None:
    """What is complete on the Hub is not sent again; the rest once, and what a fault hit twice."""
    sizes = {sha: len(content) for sha, content in _objects(bench).items()}
    for sha, sent in run.sent().items():
        _expect(sha not in complete, f"object {sha[:8]} was complete and is sent again")
        size = sizes.get(sha, sent)
        most = size * (1 + len(planned))
        _expect(sent <= most, f"{sent} bytes were sent for an object of {size}")


def _objects(bench: Bench) -> Mapping[str, bytes]:
    repo = bench.repo()
    return repo.objects if repo else {}


def _check_result(bench: Bench, schedule: Schedule) -> None:
    repo = bench.repo()
    _expect(repo is not None, "there is no repository")
    assert repo is not None
    _expect(bench.second.is_in(repo.tree("main")), "main is not the new version")
    ours = repo.messages.count(MESSAGE) - SCENARIOS[schedule.scenario].with_first
    if "damage" in schedule.kinds:
        _expect(1 <= ours <= 1 + len(schedule.runs) * 2, f"{ours} commits")
    else:
        _expect(ours == 1, f"{ours} commits instead of one")
    theirs = sum(each.kind == "moved" for run in schedule.runs for each in run)
    if not theirs:
        _expect("theirs.txt" not in repo.tree("main"), "files of others appeared")
    elif "faster" in repo.messages:
        _expect("theirs.txt" in repo.tree("main"), "a file of somebody else's was lost")


def _check_leaks(bench: Bench, requests: Sequence[Seen]) -> None:
    """No token in what was printed, logged or sent; no path of this machine in what was sent."""
    output = bench.folder / "output.txt"
    result = bench.folder / "result.json"
    said = output.read_bytes() + result.read_bytes()
    _expect(not leaks(said, TOKEN), "the token was printed")
    for seen in requests:
        sent = seen.searchable()
        _expect(not leaks(sent, TOKEN), f"the token was sent with {seen.method} {seen.path}")
        _expect(not leaks(sent, str(bench.folder)), f"a path was sent with {seen.path}")


def leaks(text: bytes, secret: str) -> bool:
    """Whether the secret is in the text: raw, URL-encoded, in JSON, in base64 at any offset."""
    raw = secret.encode()
    forms = {raw, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + raw)
        start = (0, 2, 3)[offset]
        inner = encoded[start : len(encoded) - (4 if (offset + len(raw)) % 3 else 0)]
        forms |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return any(form in text for form in forms)


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise Broken(problem)
