"""One locked virtual environment per tool, installed once per machine and lock.

`envs/<name>.in` says what is wanted, `envs/<name>.<accelerator>.lock` (from `make locks`) exactly
what is installed. An environment lives in `<cache>/environments/<name>-<hash of the lock>` and is
complete or absent: it is built in a staging folder under a file lock, checked by importing what it
is for, marked, and renamed. The interpreter is entered by its path; nothing is ever activated.
Where a part of it is compiled (:mod:`quantize.building`), the settings are in the hash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import Timeout

from quantize.building import Build, compiled, require_compiler
from quantize.disk import FULL, room, spoken
from quantize.errors import ResourceError, UsageError
from quantize.keys import digest
from quantize.liveness import DEFAULT_PATIENCE, guard
from quantize.locks import lock_on
from quantize.process import Process, index_variables
from quantize.progress import Progress
from quantize.protocol import write_json

FOLDER = Path(__file__).parent / "envs"
MARK = "complete.json"


@dataclass(frozen=True)
class Environment:
    """A tool's environment: its locks by accelerator and the imports that prove its health."""

    name: str
    purpose: str
    locks: Mapping[str, str]  # accelerator → file in envs/
    imports: tuple[str, ...]
    python: str = "3.11"  # what the locks were compiled for
    build: Build | None = None  # a package of the lock that is compiled here


ENVIRONMENTS: dict[str, Environment] = {
    "llmcompressor": Environment(
        "llmcompressor",
        "quantizes: llm-compressor, compressed-tensors, torch, transformers, peft",
        {"cpu": "llmcompressor.cpu.lock", "cuda": "llmcompressor.cuda.lock"},
        imports=("torch", "llmcompressor", "peft"),
    ),
    "autoawq": Environment(
        "autoawq",
        "quantizes: AutoAWQ, with the transformers that it was last tested with",
        {"cpu": "autoawq.cpu.lock", "cuda": "autoawq.cuda.lock"},
        imports=("torch", "awq"),
    ),
    "gptqmodel": Environment(
        "gptqmodel",
        "quantizes: GPTQModel",
        {"cpu": "gptqmodel.cpu.lock", "cuda": "gptqmodel.cuda.lock"},
        imports=("torch", "gptqmodel"),
    ),
    "vllm": Environment(
        "vllm",
        "serves: vLLM",
        {"cpu": "vllm.cpu.lock", "cuda": "vllm.cuda.lock"},
        imports=("torch", "vllm"),
    ),
    "lmeval": Environment(
        "lmeval",
        "evaluates: lm-evaluation-harness through the server's API",
        {"cpu": "lmeval.lock", "cuda": "lmeval.lock"},
        imports=("lm_eval", "transformers"),
    ),
    "llamacpp": Environment(
        "llamacpp",
        "makes and serves GGUF: llama.cpp, compiled here, with its converter",
        {"cpu": "llamacpp.cpu.lock", "cuda": "llamacpp.cuda.lock"},
        imports=("llama_cpp", "conversion", "gguf", "transformers"),
        build=Build(
            "llama-cpp-python",
            "llama_cpp",
            "llamacpp.cmake",
            "llamacpp.build.txt",
            ("llama_cpp", "vendor/llama.cpp/conversion", "vendor/llama.cpp/gguf-py/gguf"),
        ),
    ),
}


def accelerator() -> str:
    """`cuda` where an NVIDIA driver answers, else `cpu`; `QUANTIZE_ACCELERATOR` overrides."""
    chosen = os.environ.get("QUANTIZE_ACCELERATOR")
    if chosen:
        if chosen not in ("cpu", "cuda"):
            raise UsageError(f"QUANTIZE_ACCELERATOR is {chosen!r}", "set it to cpu or cuda")
        return chosen
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def cache_folder() -> Path:
    """`QUANTIZE_CACHE`, or the user's cache folder."""
    root = os.environ.get("QUANTIZE_CACHE")
    if root:
        return Path(root).expanduser().absolute()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home.absolute() / "quantize"


class Environments:
    """The environments of one accelerator, with the user's own interpreters where given."""

    def __init__(
        self, accelerator: str, cache: Path, overrides: Mapping[str, Path] | None = None
    ) -> None:
        self.accelerator = accelerator
        self.cache = cache
        self.overrides = dict(overrides or {})

    def lock_digest(self, name: str) -> str:
        """What identifies the environment's contents in a stage's key."""
        if name in self.overrides:
            python = self.overrides[name]
            found = sorted(p.name for p in python.parent.parent.glob("lib/*/site-packages/*-info"))
            return digest({"python": str(python), "distributions": found})
        environment = ENVIRONMENTS[name]
        lock = (FOLDER / environment.locks[self.accelerator]).read_text(encoding="utf-8")
        if environment.build is None:
            return digest([lock, environment.python])
        return digest([lock, environment.python, environment.build.digest(self.accelerator)])

    def folder(self, name: str) -> Path:
        """Where the environment is, or would be."""
        return self.cache / "environments" / f"{name}-{self.lock_digest(name)[:16]}"

    def installed(self, name: str) -> bool:
        """Whether it is complete (or the user's own)."""
        if name in self.overrides:
            return self.overrides[name].exists()
        # The interpreter is a link to one outside, which may have been removed since.
        return (self.folder(name) / MARK).is_file() and self.python(name).exists()

    def python(self, name: str) -> Path:
        """The interpreter; the environment must be installed."""
        if name in self.overrides:
            return self.overrides[name]
        return self.folder(name) / "bin" / "python"

    def package_path(self) -> Path:
        """A folder that holds nothing but a link to this package, for a worker's PYTHONPATH."""
        package = Path(__file__).parent
        folder = self.cache / "links" / digest(str(package))[:16]
        link = folder / "quantize"
        if not link.is_symlink() or link.readlink() != package:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(package)
            temporary.replace(link)
        return folder

    def check_overrides(self) -> None:
        """Raise a ResourceError for a user's interpreter that is not there."""
        for name, python in self.overrides.items():
            if not python.exists():
                raise ResourceError(
                    f"environments.{name}.python: {python} does not exist",
                    "correct the path in the recipe, or remove the block to use our own",
                )

    def install(self, name: str, progress: Progress, log: Path) -> Path:
        """Make sure that the environment is there; its interpreter."""
        if name in self.overrides:
            self.check_overrides()
            return self.overrides[name]
        final = self.folder(name)
        if self.installed(name):
            return self.python(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_on(final.with_name(f".{final.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"environment {name} is being installed by another process; waiting")
            held = lock.acquire()
        with held:
            if not self.installed(name):
                self._build(name, final, progress, log)
        return self.python(name)

    def _build(self, name: str, final: Path, progress: Progress, log: Path) -> None:
        environment = ENVIRONMENTS[name]
        if environment.build is not None:
            require_compiler(name, environment.build)
        staging = final.with_name(f".{final.name}.staging")
        # We hold the lock: whatever is here was left by a killed install.
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        started = time.monotonic()
        progress.note(f"installing environment {name} ({environment.purpose}), log: {log}")
        if environment.build is not None and (said := environment.build.note(self.accelerator)):
            progress.note(said)
        self._create(environment, staging, progress, log)
        self._sync(environment, staging, progress, log)
        self._check(environment, staging, progress, log)
        seconds = round(time.monotonic() - started, 1)
        write_json(staging / MARK, {"lock": self.lock_digest(name), "seconds": seconds})
        staging.rename(final)
        progress.note(f"environment {name} is ready after {seconds:.0f} s")

    def _uv(self, command: str) -> list[str]:
        """The start of a uv command; it runs in the cache, so no project's settings are read."""
        return [uv(), "--directory", str(self.cache), command]

    def _create(
        self, environment: Environment, staging: Path, progress: Progress, log: Path
    ) -> None:
        # Scripts with relative shebangs, because the folder is renamed.
        command = [*self._uv("venv"), "--relocatable", "--quiet", str(staging)]
        wanted = f"Python {environment.python}"
        done, reason = self._venv(command, environment.python, log)
        if done:
            return
        if "No interpreter found" in reason:
            # None here and none to download: the lock's pins usually fit the running one.
            progress.note(f"{wanted} not found, using {sys.version.split()[0]}")
            done, reason = self._venv(command, sys.executable, log)
            if done:
                return
        raise ResourceError(
            f"cannot create environment {environment.name} for {wanted}:\n{self._said(reason)}",
            f"install it (uv python install {environment.python}), or see the lines above",
        )

    def _venv(self, command: list[str], python: str, log: Path) -> tuple[bool, str]:
        """Whether uv made one, and its last lines; it may download an interpreter."""
        with Process([*command, "--python", python], log=log) as process:
            hung = guard(process, "creating an environment", DEFAULT_PATIENCE, lambda: 0)
            return process.wait(hung) == 0, process.tail()

    def _sync(self, environment: Environment, staging: Path, progress: Progress, log: Path) -> None:
        lock = FOLDER / environment.locks[self.accelerator]
        total = sum(1 for line in lock.read_text().splitlines() if "==" in line and line[0] != " ")
        command = [*self._uv("pip"), "install", "--python", str(staging / "bin" / "python")]
        command += ["--requirements", str(lock), "--no-deps"]
        objects = staging / "build"
        if environment.build is not None:
            command += environment.build.arguments(self.accelerator, objects)
        variables = {}
        if self.accelerator == "cpu":
            # PyPI has no CPU build of torch: a folder of wheels if pip was given one, otherwise
            # PyTorch's own index, which uv knows.
            if "PIP_FIND_LINKS" in os.environ:
                # pip's list → uv's; relative places are ours, not the cache folder's
                found = os.environ["PIP_FIND_LINKS"].split()
                places = ",".join(str(Path(p).absolute()) if Path(p).exists() else p for p in found)
                variables["UV_FIND_LINKS"] = os.environ.get("UV_FIND_LINKS", places)
            elif "UV_FIND_LINKS" not in os.environ:
                command += ["--torch-backend", "cpu"]
        with Process(command, log=log, env=index_variables() | variables) as process:
            done = made = 0
            hung = guard(
                process, f"installing {environment.name}", DEFAULT_PATIENCE, lambda: done + made
            )

            def tick() -> None:
                nonlocal done, made
                done = sum(1 for _ in staging.glob("lib/*/site-packages/*.dist-info"))
                made, objects_wanted = compiled(objects)
                if done:
                    progress.step(f"installing {environment.name}", done, total, "packages")
                elif objects_wanted:
                    progress.step(f"compiling {environment.name}", made, objects_wanted, "files")
                else:  # uv links nothing before everything is downloaded and unpacked
                    megabytes = written_bytes(process.pid) // 1_000_000
                    progress.step(f"downloading {environment.name}", megabytes, 0, "MB unpacked")
                hung()

            if process.wait(tick) != 0:
                raise ResourceError(
                    f"environment {environment.name} does not install:\n"
                    f"{self._said(process.tail())}",
                    f"the whole log is {log}; `quantize setup` tries again from where it was",
                )
        shutil.rmtree(objects, ignore_errors=True)

    def _said(self, tail: str) -> str:
        """Uv's last lines; where they tell of a full disk, what is free where it installs."""
        return f"{tail}\n{room(self.cache)}" if spoken(tail) in FULL else tail

    def _check(
        self, environment: Environment, staging: Path, progress: Progress, log: Path
    ) -> None:
        progress.step(f"checking {environment.name}: first import", 0, 0)
        if problem := self.health_of(environment, staging / "bin" / "python", log):
            raise ResourceError(
                f"environment {environment.name} is installed but does not work:\n{problem}",
                f"the whole log is {log}",
            )

    def health_of(self, environment: Environment, python: Path, log: Path) -> str:
        """Import what the environment is for; the error's last lines, or an empty text."""
        code = "; ".join(f"import {name}" for name in environment.imports)
        with Process([str(python), "-P", "-c", code], log=log) as process:
            hung = guard(process, f"importing {code!r}", DEFAULT_PATIENCE, lambda: 0)
            if (status := process.wait(hung)) == 0:
                return ""
            return process.tail() or f"importing {code!r} ended with exit code {status}"


def written_bytes(pid: int) -> int:
    """Bytes that the processes below `pid` have written so far; 0 where the system hides it."""
    total = 0
    with contextlib.suppress(psutil.Error, AttributeError):
        for process in psutil.Process(pid).children(recursive=True):
            total += process.io_counters().write_chars
    return total


def uv() -> str:
    """Path of the uv executable that was installed with this package."""
    from uv import find_uv_bin

    return os.fspath(find_uv_bin())
