"""The two majors of huggingface_hub: the one that is installed, and the other in an environment.

That environment holds the core's dependencies with another pin. It lies below the user's cache
folder, is made once with uv and found again by what is in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from quantize.environments import cache_folder, uv
from quantize.keys import digest

ROOT = Path(__file__).resolve().parents[2]
PINS = {1: "huggingface_hub>=1.0,<2", 2: "huggingface_hub>=2.0,<3"}


def installed_major() -> int:
    return int(version("huggingface_hub").partition(".")[0])


def python_for(major: int) -> Path:
    """An interpreter whose huggingface_hub is of this major; made on first use."""
    if major == installed_major():
        return Path(sys.executable)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], PINS[major]]
    folder = cache_folder() / "environments" / f"huggingface-hub-{major}-{digest(wanted)[:16]}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "complete").exists():
            _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
            _uv("pip", "install", "--quiet", "--python", str(python), *wanted)
            (folder / "complete").touch()
    return python


def _uv(*arguments: str) -> None:
    """uv, finding wheels where pip does."""
    variables = dict(os.environ)
    if "PIP_FIND_LINKS" in variables:
        variables.setdefault("UV_FIND_LINKS", ",".join(variables["PIP_FIND_LINKS"].split()))
    subprocess.run([uv(), *arguments], check=True, env=variables, cwd=cache_folder())
