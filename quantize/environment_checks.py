"""Are the tools' environments whole, and can a server listen here? Without importing any tool."""

from __future__ import annotations

import re
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from quantize.building import missing_compiler
from quantize.environments import ENVIRONMENTS, Environments, uv
from quantize.errors import ResourceError
from quantize.findings import Finding, Told
from quantize.process import Process

SIZES_GB = {
    ("llmcompressor", "cpu"): 2,
    ("llmcompressor", "cuda"): 8,
    ("autoawq", "cpu"): 2,
    ("autoawq", "cuda"): 8,
    ("gptqmodel", "cpu"): 2,
    ("gptqmodel", "cuda"): 8,
    ("vllm", "cpu"): 3,
    ("vllm", "cuda"): 12,
    ("lmeval", "cpu"): 1,
    ("lmeval", "cuda"): 1,
    ("llamacpp", "cpu"): 1,
    ("llamacpp", "cuda"): 8,
}
"""Disk that an installation takes, about; see docs/environments.md."""

MISSING = """
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit("no package " + ", ".join(missing) if missing else 0)
"""
"""Looks for packages without importing them, which takes vLLM ten seconds."""

ARCHITECTURE = re.compile(r'^ {4}"(\w+)": \(', re.MULTILINE)
"""An entry of vLLM's tables of models (`model_executor/models/registry.py`, vLLM 0.32)."""

ANSWER_SECONDS = 120.0
"""An interpreter on a network file system that nothing of is cached yet."""


def check_environments(environments: Environments, names: Sequence[str]) -> Told:
    """Those that are there have an interpreter that starts and finds its packages."""
    told = Told()
    absent = []
    for name in dict.fromkeys(names):
        if name in environments.overrides and not environments.installed(name):
            python = environments.overrides[name]
            told.findings.append(
                Finding(
                    f"environments.{name}.python: {python} does not exist",
                    "correct the path in the recipe, or remove the block to use our own",
                    ResourceError,
                )
            )
        elif not environments.installed(name):
            absent.append(name)
        elif problem := _problem(environments, name):
            told.findings.append(_broken(environments, name, problem))
    if absent:
        told.notes += [_to_install(environments, name) for name in absent]
        builds = [build for name in absent if (build := ENVIRONMENTS[name].build) is not None]
        told.notes += [said for one in builds if (said := one.note(environments.accelerator))]
        told.findings += _without_uv() + _without_compiler(absent)
    return told


def _problem(environments: Environments, name: str) -> str:
    """Why an installed environment cannot work, as far as seconds tell; an empty text."""
    # one that nobody locks here is the user's, and is named after its package
    imports = ENVIRONMENTS[name].imports if name in ENVIRONMENTS else (name,)
    command = [str(environments.python(name)), "-P", "-c", MISSING, *imports]
    deadline = time.monotonic() + ANSWER_SECONDS

    def tick() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    with (
        tempfile.TemporaryDirectory(prefix="quantize-check-") as folder,
        Process(command, log=Path(folder) / "log") as process,
    ):
        try:
            status = process.wait(tick)
        except TimeoutError:
            return f"its interpreter did not answer within {ANSWER_SECONDS:.0f} s"
        if status == 0:
            return ""
        lines = process.tail().splitlines()
    return lines[-1] if lines else f"its interpreter ended with exit code {status}"


def _broken(environments: Environments, name: str, problem: str) -> Finding:
    own = name in environments.overrides
    remedy = (
        f"install it there, or remove environments.{name} from the recipe to use our own"
        if own
        else f"remove {environments.folder(name)} and run `quantize setup`"
    )
    return Finding(f"environment {name} does not work: {problem}", remedy, ResourceError)


def _to_install(environments: Environments, name: str) -> str:
    size = SIZES_GB.get((name, environments.accelerator))
    about = f", about {size} GB" if size else ""
    compiles = ENVIRONMENTS[name].build is not None
    how = "compiles and installs it (5 to 30 minutes" if compiles else "installs it (minutes"
    return f"environment {name} is not installed yet: the run {how}{about})"


def _without_compiler(names: Sequence[str]) -> list[Finding]:
    builds = [(name, ENVIRONMENTS[name].build) for name in names]
    found = [missing_compiler(name, build) for name, build in builds if build is not None]
    return [finding for finding in found if finding is not None]


def _without_uv() -> list[Finding]:
    try:
        uv()
    except (ImportError, FileNotFoundError) as error:
        return [
            Finding(
                f"uv, which installs the environments, is not there: {error}",
                "pip install uv, in the environment that quantize is in",
                ResourceError,
            )
        ]
    return []


def check_loopback() -> Told:
    """A free port on 127.0.0.1, where the server will listen."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
    except OSError as error:
        return Told(
            [
                Finding(
                    f"no server can listen on 127.0.0.1 here: {error}",
                    "allow the loopback interface in this container or sandbox",
                    ResourceError,
                )
            ]
        )
    return Told()


def check_server(environments: Environments, architecture: str) -> list[str]:
    """A note where the installed vLLM has no implementation of its own; it may use another's."""
    if not environments.installed("vllm"):
        return []
    root = environments.python("vllm").parent.parent
    known: set[str] = set()
    for path in root.glob("lib/*/site-packages/vllm/model_executor/models/registry.py"):
        known |= set(ARCHITECTURE.findall(path.read_text(encoding="utf-8")))
    if not known or architecture in known:
        return []
    return [
        f"the installed vLLM has no {architecture} of its own and falls back on transformers' "
        "code, if that fits: try serving it first"
    ]
