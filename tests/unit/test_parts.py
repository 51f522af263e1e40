"""A finished part is taken over as it was written, or measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.measure.parts import Parts

VALUE = {"tokens": 12, "nats": [0.1, 2e-9], "tuple": (1, 2), 10: "ten", 9: "nine"}


def test_a_finished_part_is_not_made_again(tmp_path: Path) -> None:
    made = Parts(tmp_path).get("task:x/y", lambda: VALUE)
    assert made == json.loads(json.dumps(VALUE))

    def again() -> Any:
        raise AssertionError("made again")

    assert Parts(tmp_path).get("task:x/y", again) == made


def flip(path: Path) -> None:
    path.write_text(path.read_text().replace("12", "13"))


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


def list_(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("spoil", [flip, cut, empty, no_text, list_, Path.unlink])
def test_a_spoilt_part_is_measured_again(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    Parts(tmp_path).get("perplexity", lambda: VALUE)
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert not Parts(tmp_path).has("perplexity")
    assert Parts(tmp_path).get("perplexity", lambda: {"tokens": 14}) == {"tokens": 14}
