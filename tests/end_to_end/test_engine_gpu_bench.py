"""The GPU benchmark's script, tried where there is no GPU."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, environment

pytestmark = pytest.mark.end_to_end

SCRIPT = ROOT / "bench" / "engine_gpu.py"


def test_dry_run(environment_python: Callable[[str], Path], tmp_path: Path) -> None:
    report = SCRIPT.with_suffix(".md")
    before = report.read_bytes() if report.exists() else None
    python = str(environment_python("llmcompressor"))
    command = [python, str(SCRIPT), "--scratch", str(tmp_path), "--cpu-dry-run"]
    command += ["--engines", "stream", "--methods", "awq+gptq", "fp8"]
    done = subprocess.run(
        command, env=environment(), timeout=300, stdout=subprocess.PIPE, text=True, check=True
    )
    assert "not a measurement" in done.stdout
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| stream")]
    assert [row[2].strip() for row in table] == ["awq+gptq", "fp8"]
    for row in table:
        assert float(row[4]) > 0, "no seconds a layer"
        assert [cell.strip() for cell in row[6:9]] == ["–"] * 3, "a GPU's figures from a CPU"
        assert "from 3 layers" in row[9]
    assert (report.read_bytes() if report.exists() else None) == before
    assert not list(tmp_path.iterdir())
