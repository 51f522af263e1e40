"""Content addresses: canonical JSON and sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """sha256 (hex) of :func:`canonical`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(root: Path, names: list[str]) -> str:
    """One digest for some files below `root`: their names and contents."""
    return digest({name: file_sha256(root / name) for name in sorted(names)})


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two key inputs differ, each with its old and new value."""
    changes: list[str] = []
    for name in sorted({*old, *new}):
        path = f"{prefix}{name}"
        sides = [[side[name]] if name in side else [] for side in (old, new)]
        if canonical(sides[0]) == canonical(sides[1]):
            continue
        if all(side and isinstance(side[0], Mapping) for side in sides):
            changes += difference(old[name], new[name], path + ".")
        else:
            shown = [_short(side[0]) if side else "absent" for side in sides]
            changes.append(f"{path}: {shown[0]} → {shown[1]}")
    return changes


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a digest
        return value[:12]
    text = canonical(value)
    return text if len(text) <= 48 else text[:45] + "..."
