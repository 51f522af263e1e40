"""What fuzzing found or started from, replayed: only typed errors (tests/faults/fuzz.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz_targets import CORPUS, TARGETS, execute

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_replay(path: Path) -> None:
    execute(path.parent.name, path.read_bytes())


def test_every_target_has_inputs() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)
