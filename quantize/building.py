"""Environments of which a part is compiled here: its settings, its compilers, its progress.

A source distribution is compiled by scikit-build-core (CMake and Ninja, from PyPI where the system
has none) while uv installs the lock. What only the machine can bring is a C and a C++ compiler.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ResourceError
from quantize.findings import Finding
from quantize.keys import digest

FOLDER = Path(__file__).parent / "envs"

COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
"""The variable that CMake reads, and the names that it looks for where that is not set."""

OBJECT = re.compile(rb"^build \S+\.o:", re.MULTILINE)
"""A rule of build.ninja that compiles one file."""

INSTALL = (
    "install one (Debian, Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++), or name it "
    "by CC and CXX, or set environments.{name}.python to an environment that has {package}"
)


@dataclass(frozen=True)
class Build:
    """How a source distribution of the lock is compiled."""

    package: str  # its distribution's name
    project: str  # what it calls itself in CMake's project()
    cmake: str  # file in envs/ that this project includes: all settings
    constraints: str  # file in envs/: versions of the build's own requirements
    packages: tuple[str, ...]  # folders of the sdist that become Python packages

    def settings(self, accelerator: str) -> dict[str, str]:
        """CMake definitions that depend on the machine: CUDA only where it can be compiled."""
        return {"QUANTIZE_CUDA": "ON"} if accelerator == "cuda" and has_nvcc() else {}

    def note(self, accelerator: str) -> str | None:
        """What the build leaves out on this machine."""
        if accelerator == "cuda" and not has_nvcc():
            return f"{self.package} is compiled for CPUs alone: nvcc, CUDA's compiler, is not here"
        return None

    def digest(self, accelerator: str) -> str:
        """What identifies the settings, as part of the environment's identity."""
        texts = [(FOLDER / name).read_text("utf-8") for name in (self.cmake, self.constraints)]
        return digest([*texts, list(self.packages), self.settings(accelerator)])

    def arguments(self, accelerator: str, folder: Path) -> list[str]:
        """Arguments of `uv pip install`; objects are written into `folder`."""
        defined = {
            f"CMAKE_PROJECT_{self.project}_INCLUDE": str(FOLDER / self.cmake),
            "QUANTIZE_ENVIRONMENT": self.digest(accelerator),
            **self.settings(accelerator),
        }
        settings = {
            "build-dir": str(folder),
            "wheel.packages": ";".join(self.packages),
            **{f"cmake.define.{name}": value for name, value in defined.items()},
        }
        arguments = ["--no-binary", self.package]
        arguments += ["--build-constraints", str(FOLDER / self.constraints)]
        for name, value in settings.items():
            arguments += ["--config-settings-package", f"{self.package}:{name}={value}"]
        return arguments


def has_nvcc() -> bool:
    """Whether CMake will find a CUDA compiler: `CUDACXX`, the path, or the usual place."""
    named = os.environ.get("CUDACXX")
    return bool(named or shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())


def missing_compiler(name: str, build: Build) -> Finding | None:
    """The finding where environment `name` cannot be compiled on this machine."""
    missing = [
        " or ".join(names)
        for variable, names in COMPILERS.items()
        if not shutil.which(os.environ.get(variable) or "") and not any(map(shutil.which, names))
    ]
    if not missing:
        return None
    return Finding(
        f"environment {name} compiles {build.package} here, and there is no compiler on this "
        f"machine: no {', no '.join(missing)} on PATH",
        INSTALL.format(package=build.package, name=name),
        ResourceError,
    )


def require_compiler(name: str, build: Build) -> None:
    """Raise :func:`missing_compiler` as an error."""
    if (finding := missing_compiler(name, build)) is not None:
        raise ResourceError(finding.message, finding.hint)


def compiled(folder: Path) -> tuple[int, int]:
    """Object files that are there and that there will be; (0, 0) before CMake has written rules."""
    try:
        total = len(OBJECT.findall((folder / "build.ninja").read_bytes()))
    except OSError:
        return 0, 0
    return sum(1 for _ in folder.rglob("*.o")), total
