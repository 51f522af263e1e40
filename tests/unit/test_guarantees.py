"""Every test that docs/guarantees.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_named_test_exists() -> None:
    named = NAMED.findall((ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or not _defines((ROOT / file).read_text("utf-8"), name)
    ]
    assert missing == []


def _defines(text: str, name: str) -> bool:
    return re.search(rf"^(def {name}\(|class {name}\b|{name} = )", text, re.MULTILINE) is not None


def test_every_row_names_a_test() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not row.startswith("| Promise")]
    assert [row for row in rows if not NAMED.search(row)] == []
