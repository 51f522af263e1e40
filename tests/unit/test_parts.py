"""Finished parts of a measurement survive; unfinished ones leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.measure.parts import Parts


def test_a_part_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"score": 0.5}

    first = Parts(tmp_path)
    assert not first.has("task:arc/easy")
    assert first.get("task:arc/easy", make) == {"score": 0.5}
    later = Parts(tmp_path)  # another run, after a kill
    assert later.has("task:arc/easy")
    assert later.get("task:arc/easy", make) == {"score": 0.5}
    assert made == [1]
    assert later.seconds == first.seconds
    assert first.seconds["task:arc/easy"] >= 0
    assert later.get("load", lambda: [1]) == [1]
    assert not later.has("smoke")


def test_a_failed_part_is_not_there(tmp_path: Path) -> None:
    parts = Parts(tmp_path)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parts.get("smoke", fail)
    assert not parts.has("smoke")
    assert parts.seconds == {}
    assert parts.get("smoke", lambda: None) is None
    assert parts.has("smoke")


def test_a_value_that_json_cannot_hold_is_not_a_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        parts.get("perplexity", lambda: float("nan"))
    assert not parts.has("perplexity")


def test_a_value_does_not_change_by_being_kept(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    value = {"a": (1, 2), "b": 1e-300, "c": "ü\u2028"}
    assert parts.get("x", lambda: value) == parts.get("x", lambda: None)
    assert parts.get("x", lambda: None) == json.loads(json.dumps(value))


def test_only_whole_files_count(tmp_path: Path) -> None:
    Parts(tmp_path).get("smoke", lambda: 1)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / f".{path.name}.123.tmp")  # killed before the rename
    assert Parts(tmp_path).get("smoke", lambda: 2) == 2
