"""The real tools, once a session: environments from the user's cache, one store for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantize.environments import Environments, accelerator, cache_folder
from quantize.machine import cpu_has
from quantize.progress import LineView, Progress

ROOT = Path(__file__).resolve().parents[2]
SHORT_SUITE = Path(__file__).with_name("short.yaml")
"""For tests that need a verdict, and not the shipped suite's figures."""

slow_without_bf16 = pytest.mark.end_to_end if cpu_has("avx512_bf16") else pytest.mark.slow
"""Marks what takes minutes where the processor has no products in BF16 and they are emulated."""


@dataclass(frozen=True)
class Finished:
    """One command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


@dataclass(frozen=True)
class Work:
    """A working directory with a store, shared by the tests of one session."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "quantize", *arguments]

    def quantize(self, *arguments: str, env: Mapping[str, str] | None = None) -> Finished:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=environment(env),
            capture_output=True,
            text=True,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def run(
        self, recipe: str | Path, *arguments: str, env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """`quantize run RECIPE --json`, which must succeed; its result."""
        store = ("--store", str(self.store))
        done = self.quantize("run", str(recipe), *store, "--json", *arguments, env=env)
        assert done.code == 0, done.err + done.out
        return done.json()


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """No hub: everything that the tests need is in the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(extra or {})}


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def environment_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Interpreter of an environment by name, installed on first use."""
    here = Environments(accelerator(), cache_folder())
    log = tmp_path_factory.mktemp("logs") / "environments.log"

    def python(name: str) -> Path:
        return here.install(name, Progress(LineView(print)), log)

    return python
