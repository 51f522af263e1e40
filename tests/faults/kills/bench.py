"""Where the trials run: one recipe, one undisturbed run to compare with, one store made anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from quantize.environments import cache_folder
from quantize.store import Artifact, Store

ROOT = Path(__file__).resolve().parents[3]
MARK = "QUANTIZE_FAULT_TRIAL"
"""In the environment of every process of a trial, so that survivors are found."""
GONE_SECONDS = 30.0
"""A supervisor ends what it started within its 15 s of grace; a busy machine takes longer."""

MODULE = (sys.executable, "-m", "quantize")
ALWAYS = ("evaluate.gate.inconclusive=pass", "evaluate.noise=false", "evaluate.retention=false")
MEASURED = ("evaluate.quick=true", *ALWAYS)
UNMEASURED = ("evaluate=null",)


class Broken(Exception):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code (negative: by a signal) and what it said."""

    code: int
    out: str
    err: str

    def states(self) -> dict[str, str]:
        """`hit` or `ran` by stage, from the run's JSON."""
        return {stage["id"]: stage["state"] for stage in json.loads(self.out)["stages"]}


class Bench:
    """The tiny GPTQ recipe below one folder; measured by the quick suite, or not at all."""

    def __init__(self, folder: Path, *, measured: bool) -> None:
        self.folder = folder.absolute()
        self.store = Store(self.folder / "store")
        self.clean = Store(self.folder / "clean")
        self.published, self.clean_published = self.folder / "out", self.folder / "clean-out"
        self.sets = MEASURED if measured else UNMEASURED
        self.stages: dict[str, tuple[str, str]] = {}  # id → (kind, key), in the plan's order
        cache = self.folder / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / "environments").exists():
            (cache / "environments").symlink_to(cache_folder() / "environments")

    def prepare(self) -> None:
        """The undisturbed run, once; an earlier campaign's is taken over."""
        if not self.clean.root.exists():
            self.reset("")
            ended = self.run()
            if ended.code != 0:
                raise Broken(f"the undisturbed run ended with {ended.code}: {ended.err[-2000:]}")
            os.rename(self.store.root, self.clean.root)
            os.rename(self.published, self.clean_published)
        self.stages = self.planned()
        other = [name for name, at in self.stages.items() if not self.clean.path(*at).exists()]
        if other:
            raise Broken(
                f"{self.folder} was prepared by another checkout, or with other measurements: its "
                f"undisturbed run has no {', '.join(other)} with these keys; delete it"
            )

    def planned(self) -> dict[str, tuple[str, str]]:
        """(kind, key) of every stage by its id, in the plan's order."""
        done = subprocess.run(
            [*self.command("plan", self.clean), "--json"],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        found = {}
        for stage in json.loads(done.stdout)["stages"]:
            kind = "measure" if stage["id"].startswith("measure") else stage["id"]
            found[stage["id"]] = (kind, stage["key"])
        return found

    def reset(self, stage: str) -> None:
        """A store with what comes before `stage`, copied: nothing reaches the originals."""
        for folder in (self.store.root, self.published):
            shutil.rmtree(folder, ignore_errors=True)
        for name, (kind, key) in self.stages.items():
            if name == stage:
                return
            shutil.copytree(self.clean.path(kind, key), self.store.path(kind, key))

    def reference(self, stage: str) -> Artifact:
        """The undisturbed run's artifact."""
        artifact = self.clean.get(*self.stages[stage])
        assert artifact is not None
        return artifact

    def run(
        self,
        *arguments: str,
        under: Sequence[str] = (),
        seconds: float = 1800,
        python: Sequence[str] = MODULE,
    ) -> Ended:
        """One `quantize run`; Broken when it does not end, or leaves a process behind."""
        command = [*under, *self.command("run", self.store, python), "--json", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            self._end_all()
            process.communicate()
            raise Broken(f"the run did not end within {seconds:.0f} s") from error
        self.nobody_survives()
        return Ended(process.returncode, out, err)

    def environment(self) -> dict[str, str]:
        """No hub, a cache of its own (with this machine's environments), and the mark."""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        ours = {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "QUANTIZE_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",  # threads that wait for each other cost calls, each a stop
            MARK: str(self.folder),
        }
        return {**kept, **ours}

    def command(self, what: str, store: Store, python: Sequence[str] = MODULE) -> list[str]:
        """`quantize WHAT` of the recipe, on a store."""
        command = [*python, what, "tiny-llama-gptq"]
        command += ["--store", str(store.root), "--set", f"publish.folder={self.published}"]
        for value in self.sets:
            command += ["--set", value]
        return command

    def _marked(self) -> list[psutil.Process]:
        """Living processes of this bench's trials."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.is_running():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return [p for p in found if _lives(p)]

    def nobody_survives(self) -> None:
        """Wait until every process of the trial is gone; Broken when one stays."""
        deadline = time.monotonic() + GONE_SECONDS
        while left := self._marked():
            if time.monotonic() > deadline:
                names = [" ".join(process.cmdline())[:120] for process in left]
                self._end_all()
                raise Broken(f"survivors: {names}")
            time.sleep(0.1)

    def _end_all(self) -> None:
        for process in self._marked():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
