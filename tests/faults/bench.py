"""A Hub, a driver process and the two versions: what schedules are tried on, one after another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults.clients import ROOT, python_for
from tests.faults.schedules import LATE_SECONDS, Planned, simple_fault
from tests.faults.versions import (
    FIRST,
    IN_MEMORY_BYTES,
    LIMITS,
    SECOND,
    Version,
    write_version,
)
from tests.hub_server import Account, Fault, Hub, HubServer, Seen
from tests.hub_server.repos import Repo

TOKEN = "hf_canary+Token/ThatMustNot=Leak"
REPO = "ann/model"
MESSAGE = "Publish model"
TAG = "v2"
COLLECTION = "ann/models-000000000000000000000000"
OBJECT = re.compile(r"/_lfs/ann/model/([0-9a-f]{64})")


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
    """Where a push begins (the first version on main, or no repository) and where it goes."""

    with_first: bool
    target: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pull_request(self) -> bool:
        return bool(self.target.get("pull_request"))


SCENARIOS: dict[str, Scenario] = {
    "update": Scenario(with_first=True),
    "new": Scenario(with_first=False),
    "pull-request": Scenario(with_first=True, target={"pull_request": True}),
    "tagged": Scenario(with_first=True, target={"tag": TAG, "collection": COLLECTION}),
}


class Bench:
    """A Hub, a driver of one major and the two versions, for many schedules one after another."""

    def __init__(
        self, major: int, folder: Path, disable_xet: str | None = None, *, xet: bool = False
    ) -> None:
        """`xet`: the Hub has Xet storage. `disable_xet` is the variable HF_HUB_DISABLE_XET.

        hf_xet is installed in any case.
        """
        self.major, self.folder, self.disable_xet = major, folder, disable_xet
        self.xet = xet
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
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        if self.disable_xet is not None:
            variables["HF_HUB_DISABLE_XET"] = self.disable_xet
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
        settings: dict[str, Any] = {"files.IN_MEMORY_BYTES": IN_MEMORY_BYTES}
        if timeout is not None:
            settings["client.TIMEOUT_SECONDS"] = timeout
        job = {
            "endpoint": self.server.endpoint,
            "folder": str(version.folder),
            "target": {"repo": REPO, **scenario.target},
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
            self.server.hub = Hub({TOKEN: Account("ann")}, replace(LIMITS))
            self.server.hub.xet = self.xet
            assert self.server.hub.create_collection("Models", "ann").slug == COLLECTION
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
