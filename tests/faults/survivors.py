"""Kills real runs at random moments: nothing survives, no port is held, the next run goes on.

``python -m tests.faults.survivors --kills 100 [--seed 0] [--minutes 20] [--store FOLDER]``

Each trial starts the tiny GPTQ recipe, waits for a random time, and kills: the run (SIGKILL, or
SIGTERM, SIGUSR1 or SIGINT, after which it must end with 75 in 20 s), a supervisor, or a process of
a tool (SIGKILL to the engine, a worker, ...). This process is a child subreaper: whatever
loses its parent becomes its child, so what survives cannot hide. The trials share a store, as a
scheduler's repeated attempts do; when a run has finished, the next begins with an empty one, or
with a copy of FOLDER, so that later stages are reached sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from quantize.supervise import PR_SET_CHILD_SUBREAPER, prctl

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}
KINDS = ("run", "run", *SIGNALS, "supervisor", "tool", "tool")
"""What is killed; the run by SIGKILL and a tool's process twice as often."""
STOP_SECONDS = 20.0  # promised after a first signal
GONE_SECONDS = 20.0  # after SIGKILL of the run: the tools' grace period is 10 s
END_SECONDS = 120.0  # for a run that lost a tool
SET = (
    "evaluate.suite=smoke",
    "evaluate.noise=false",
    "evaluate.gate.inconclusive=pass",
)


@dataclass
class Trial:
    """What one kill did."""

    kind: str
    stage: str = "start"
    code: int | None = None
    seconds: float = 0.0  # from the kill until nothing was left
    processes: int = 0  # below the run when it was killed
    ports: int = 0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        said = "; ".join(self.problems) or "ok"
        return (
            f"{self.kind:10} {self.stage:18} code {self.code!s:5} {self.processes:2} processes "
            f"{self.ports} ports, gone after {self.seconds:4.1f} s: {said}"
        )


class Campaign:
    """A store, and the kills that are done to the runs that fill it."""

    def __init__(self, folder: Path, seed: int, template: Path | None) -> None:
        self.folder, self.store, self.template = folder, folder / "store", template
        self.begin_anew()
        self.random = random.Random(seed)
        self.trials: list[Trial] = []
        self.finished = 0  # runs that came to their end

    def begin_anew(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        if self.template is not None:
            skip = shutil.ignore_patterns(".runs", ".staging")
            shutil.copytree(self.template, self.store, ignore=skip)

    def trial(self) -> Trial:
        """One run, one kill."""
        trial = Trial(self.random.choice(KINDS))
        at_the_start = self.random.random() < 0.1
        longest = self.random.choice((6.0, 30.0, 90.0))
        seconds = self.random.uniform(0.0, 1.5 if at_the_start else longest)
        before = self.artifacts()
        process = self.start()
        while not at_the_start and self.stage(process.pid) == "start" and process.poll() is None:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is not None:
            self.end_of_run(trial, process)
        else:
            trial.stage = self.stage(process.pid)
            self.kill(trial, process)
        changed = [path for path, when in before.items() if self.artifacts().get(path) != when]
        if self.template is not None:  # a copied store's sources may lie elsewhere
            changed = [path for path in changed if "/fetch/" not in path]
        if changed and trial.kind != "end":
            trial.problems.append(f"made again: {changed}")
        self.trials.append(trial)
        return trial

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "quantize", "run", "tiny-llama-gptq"]
        command += ["--store", str(self.store), "--set", f"publish.folder={self.folder}/out"]
        for assignment in SET:
            command += ["--set", assignment]
        with (self.folder / "said").open("wb") as said:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
                stdout=said,
                stderr=said,
            )

    def kill(self, trial: Trial, process: subprocess.Popen[bytes]) -> None:
        below = psutil.Process(process.pid).children(recursive=True)
        ports = [port for p in below for port in listening(p)]
        trial.processes, trial.ports = len(below), len(ports)
        if trial.kind in ("supervisor", "tool"):
            victims = [p for p in below if is_supervisor(p) == (trial.kind == "supervisor")]
            if not victims:
                trial.kind = "run"
        began = time.monotonic()
        if trial.kind == "run":
            process.kill()
        elif trial.kind in SIGNALS:
            process.send_signal(SIGNALS[trial.kind])
        else:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.random.choice(victims).kill()
        limit = STOP_SECONDS if trial.kind in SIGNALS else END_SECONDS
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        ended = time.monotonic()
        trial.code = process.poll()
        self.check_code(trial, limit)
        allowed = GONE_SECONDS if trial.code == -signal.SIGKILL else 1.0
        while survivors() and time.monotonic() - ended < allowed:
            time.sleep(0.05)
        trial.seconds = time.monotonic() - began
        for left in survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                trial.problems.append(f"survivor: {left.pid} {' '.join(left.cmdline())[:120]}")
                left.kill()
        trial.problems += [f"port {port} is held" for port in ports if not is_free(port)]

    def check_code(self, trial: Trial, limit: float) -> None:
        """Exit code, and what the run says of itself."""
        said = (self.folder / "said").read_text(errors="replace")
        if trial.code is None:
            trial.problems.append(f"still there after {limit:.0f} s")
        elif trial.kind in SIGNALS:
            too_early = trial.stage == "start" and trial.code in (-SIGNALS[trial.kind], 1)
            if trial.code not in (75, 0) and not too_early:
                trial.problems.append(f"ended with {trial.code}: {said[-300:]}")
            if trial.code == 75 and trial.stage != "start":
                self.check_result(trial)
        elif trial.kind in ("supervisor", "tool") and trial.code not in (0, 4, 75):
            trial.problems.append(f"ended with {trial.code}: {said[-600:]}")
        if "this is a bug of quantize" in said:
            trial.problems.append(f"traceback: {said[-300:]}")

    def check_result(self, trial: Trial) -> None:
        newest = self.newest()
        assert newest is not None
        for name in ("status.json", "result.json"):
            found = newest / name
            value = json.loads(found.read_text()) if found.exists() else {}
            if value.get("exit_code") != 75:
                trial.problems.append(f"{name} says {value.get('exit_code')}")

    def end_of_run(self, trial: Trial, process: subprocess.Popen[bytes]) -> None:
        """It was done before it could be killed."""
        trial.kind, trial.stage, trial.code = "end", "", process.returncode
        if process.returncode != 0:
            said = (self.folder / "said").read_text(errors="replace")
            trial.problems.append(f"a run by itself ended with {process.returncode}: {said[-600:]}")
        self.finished += 1
        self.begin_anew()

    def newest(self) -> Path | None:
        folders = list((self.store / ".runs").glob("*"))
        return max(folders, key=lambda path: path.stat().st_mtime) if folders else None

    def stage(self, pid: int) -> str:
        """Of the run that is under way, from its status.json."""
        newest = self.newest()
        file = newest / "status.json" if newest else None
        if file is None or not file.exists():
            return "start"
        status = json.loads(file.read_text())
        return str(status.get("stage", "preflight")) if status["pid"] == pid else "start"

    def artifacts(self) -> dict[str, float]:
        return {str(p.parent): p.stat().st_mtime for p in self.store.glob("*/*/manifest.json")}

    def summary(self) -> str:
        kills = [trial for trial in self.trials if trial.kind != "end"]
        broken = [trial for trial in self.trials if trial.problems]
        stopped = [trial.seconds for trial in kills if trial.kind in SIGNALS]
        lines = [
            f"{len(kills)} kills, {self.finished} runs to their end, {len(broken)} broken",
            f"kinds: {dict(Counter(trial.kind for trial in kills))}",
            f"stages: {dict(Counter(trial.stage for trial in kills))}",
            f"codes: {dict(Counter(str(trial.code) for trial in kills))}",
            f"processes below the run when killed: {sum(trial.processes for trial in kills)}, "
            f"ports: {sum(trial.ports for trial in kills)}",
            f"longest from a signal to the end: {max(stopped, default=0):.1f} s",
        ]
        return "\n".join([*lines, *(f"  {trial.line()}" for trial in broken)])


def survivors() -> list[psutil.Process]:
    """Whatever lives below this process, collected first if it is over."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def is_supervisor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(part.endswith("supervise.py") for part in process.cmdline())
    return False


def listening(process: psutil.Process) -> list[int]:
    with contextlib.suppress(psutil.Error):
        found = process.net_connections(kind="tcp")
        return [c.laddr.port for c in found if c.status == psutil.CONN_LISTEN]
    return []


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def campaign(
    folder: Path, kills: int, seed: int, minutes: float, template: Path | None
) -> Campaign:
    """So many kills, or as many as there is time for."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    work, deadline = Campaign(folder, seed, template), time.monotonic() + 60 * minutes
    while len(work.trials) - work.finished < kills and time.monotonic() < deadline:
        print(work.trial().line(), flush=True)
    return work


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.survivors", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0, help="start no trial after these")
    parser.add_argument("--store", type=Path, help="begin with a copy of it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        limits = (arguments.kills, arguments.seed, arguments.minutes)
        work = campaign(Path(folder), *limits, arguments.store)
        print(work.summary())
    sys.exit(1 if any(trial.problems for trial in work.trials) else 0)


if __name__ == "__main__":
    main()
