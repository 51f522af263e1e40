"""The wheel, away from the checkout: recipes, suites and the small checkpoint are found by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.environments import uv
from tests.end_to_end.conftest import ROOT, Work, environment

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `quantize` command that was installed from the built wheel."""
    folder = tmp_path_factory.mktemp("installed")
    for command in (
        [uv(), "build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT)],
        [uv(), "venv", "--quiet", "--python", sys.executable, str(folder / "venv")],
    ):
        subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([uv(), "pip", "install", "--quiet", "--python", python, wheel], check=True)
    return folder / "venv" / "bin" / "quantize"


def test_plan_and_run_by_name(installed: Path, work: Work, tmp_path: Path) -> None:
    env = environment()
    del env["PYTHONPATH"]
    store = ["--store", str(work.store)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installed, *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    planned = run("plan", "tiny-llama-fp8", "--json", *store)
    assert planned.returncode == 0, planned.stderr
    here = work.quantize("plan", "tiny-llama-fp8", "--json", *store).json()
    # the same keys: what ships is what the checkout has
    assert [s["key"] for s in json.loads(planned.stdout)["stages"]] == [
        s["key"] for s in here["stages"]
    ]
    done = run("run", "tiny-llama-fp8", "--until", "audit", *store)
    assert done.returncode == 0, done.stderr
