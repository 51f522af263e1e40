"""The one place that starts processes: supervised, logged, never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

import quantize.supervise
from quantize import stop
from quantize.supervise import KILL_AT_ONCE, descendants

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL. Slurm and spot machines give 30 s or more in all."""
POLL_SECONDS = 0.05
TAIL_LINES = 20
LOG_BYTES = 64 << 20
"""Of more output, the first and the newest lines are kept (:class:`quantize.supervise.Log`)."""
STACK_SECONDS = 5.0
"""How long a hung process is given to write down where it hangs."""

SECRETS = frozenset(
    {
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HUGGINGFACE_HUB_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "FSSPEC_S3_KEY",
        "FSSPEC_S3_SECRET",
        "FSSPEC_S3_TOKEN",
        "AZURE_CLIENT_SECRET",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",  # whoever has it can sign as this workflow
        "SIGSTORE_ID_TOKEN",
    }
)
"""Variables that reach a child only when its caller passes them on by name."""

SECRET_NAME = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEYS?|ACCESS_KEYS?|"
    r"PRIVATE_KEYS?|SECRET_KEYS?|SAS|COOKIE)(_|$)",
    re.IGNORECASE,
)
"""Names that say that they hold a secret: WANDB_API_KEY, GITHUB_TOKEN, UV_INDEX_MINE_PASSWORD. What
is called TOKENIZERS_PARALLELISM does not."""

INDEX_NAME = re.compile(r"(UV|PIP)_\w*(INDEX|FIND_LINKS|KEYRING)\w*")
"""uv's and pip's places of packages, whose addresses may hold a password: for uv alone."""

_withheld: set[str] = set()


def withhold(variables: Iterable[str]) -> None:
    """Treat these variables like SECRETS from now on: their names are the user's choice."""
    _withheld.update(variables)


class Process:
    """A child under :mod:`quantize.supervise`, its output in `log`.

    A context manager: leaving the block ends the child and everything it started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        supervisor = [sys.executable, "-I", "-S", quantize.supervise.__file__]
        supervisor += [str(os.getpid()), str(GRACE_SECONDS), str(LOG_BYTES)]
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.command = list(command)
        self.hung = ""  # why we killed it, if we did
        with stop.held(), log.open("a+b") as output:  # "+": the supervisor shortens what is long
            self._start = log.stat().st_size
            self._popen = subprocess.Popen(
                supervisor + self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(env or {}),
                start_new_session=True,
            )
            stop.add_child(self.pid)

    @property
    def pid(self) -> int:
        """The supervisor's process id; the child and its children are below it."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._popen.poll()

    def wait(self, on_tick: Callable[[], None] = lambda: None) -> int:
        """Wait for the end, calling `on_tick` about twenty times a second; the exit code."""
        while (code := self._popen.poll()) is None:
            stop.check()
            on_tick()
            time.sleep(POLL_SECONDS)
        on_tick()
        return code

    def end(self) -> None:
        """SIGTERM to the whole tree, SIGKILL after the grace period; returns when it is gone."""
        with stop.held():
            if self._popen.poll() is None:
                self._popen.terminate()
                try:
                    self._popen.wait(GRACE_SECONDS + 3)
                except subprocess.TimeoutExpired:
                    self._popen.kill()
                    self._popen.wait()
            if self._popen.returncode < 0:  # the supervisor was killed and could end nobody
                self._end_orphans()
            stop.remove_child(self.pid)

    def kill(self, why: str) -> None:
        """SIGKILL to the whole tree, because it hangs; first it may write its stacks to the log."""
        self.hung = why
        self._write_stacks()
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(KILL_AT_ONCE)

    def _end_orphans(self) -> None:
        """What a killed supervisor left: in its process group, or handed to us by the kernel."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + STACK_SECONDS
        # one that dies hands its own children to us: until there are none
        while stop.collects_orphans() and (orphans := _orphans()) and time.monotonic() < deadline:
            for process in orphans:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    process.wait(1)

    def _write_stacks(self) -> None:
        """Have every Python process of the tree write the stacks of its threads to the log.

        They end by that: PYTHONFAULTHANDLER makes SIGABRT do both, wherever a process hangs.
        """
        for pid in descendants(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        deadline = time.monotonic() + STACK_SECONDS
        while (
            any(not _is_stopped(pid) for pid in descendants(self.pid))
            and time.monotonic() < deadline
        ):
            time.sleep(POLL_SECONDS)

    def output(self) -> str:
        """Everything this process has written so far."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode("utf-8", "replace")

    def tail(self) -> str:
        """The last lines of the output, for an error message."""
        return "\n".join(self.output().splitlines()[-TAIL_LINES:])

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def _is_stopped(pid: int) -> bool:
    """Whether it is stopped, and so will not write anything."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return True


def _orphans() -> list[psutil.Process]:
    """Our children that are no supervisors, with what is below them."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child.pid not in stop.children():
            with contextlib.suppress(psutil.Error):
                found += child.children(recursive=True)
            found.append(child)
    return found


CHILD_SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONFAULTHANDLER": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # the token that `hf auth login` wrote into a file
    "HF_DATASETS_TRUST_REMOTE_CODE": "0",
}
"""What every child is told."""


def hub_token() -> dict[str, str]:
    """The user's token, for the few children that read private or gated data from the Hub.

    That of `hf auth login` lies in a file, which these children may use, too.
    """
    own = {"HF_TOKEN": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    return {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", **own}


def index_variables() -> dict[str, str]:
    """Where packages come from and how one gets in there, for the child that installs them."""
    return {name: value for name, value in os.environ.items() if INDEX_NAME.fullmatch(name)}


def is_secret(name: str) -> bool:
    """Whether a variable is kept from children that do not ask for it by name."""
    if name in SECRETS or name in _withheld:
        return True
    return SECRET_NAME.search(name) is not None or INDEX_NAME.fullmatch(name) is not None


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment without secrets and without what would lead a child to our packages.

    Nor without bytecode: images often set that, and each process of vLLM then compiles for 15 s.
    """
    drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"}
    kept = {k: value for k, value in os.environ.items() if k not in drop and not is_secret(k)}
    return {**kept, **CHILD_SETTINGS, **extra}
