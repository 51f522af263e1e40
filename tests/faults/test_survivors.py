"""A few of the random kills of ``python -m tests.faults.survivors``; by hand it does a hundred."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ROOT

pytestmark = pytest.mark.end_to_end


def test_nothing_survives_a_few_kills() -> None:
    command = [sys.executable, "-m", "tests.faults.survivors"]
    command += ["--kills", "3", "--seed", "5", "--minutes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
