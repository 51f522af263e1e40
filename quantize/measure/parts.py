"""Finished parts of a measurement, kept in the stage's scratch folder across a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.keys import digest
from quantize.protocol import write_json


@dataclass
class Parts:
    """One JSON file a part; a part that is there is not measured again."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part's value, made now if it is not there yet."""
        if not self.has(name):
            started = time.monotonic()
            value = make()
            self.put(name, value, time.monotonic() - started)
        return self.value(name)

    def put(self, name: str, value: Any, seconds: float) -> None:
        """Keep a part that was measured elsewhere."""
        sha256 = _digest(value, seconds)
        write_json(self._path(name), {"value": value, "seconds": seconds, "sha256": sha256})

    def value(self, name: str) -> Any:
        """A finished part."""
        stored = json.loads(self._path(name).read_text(encoding="utf-8"))
        self.seconds[name] = stored["seconds"]
        return stored["value"]

    def has(self, name: str) -> bool:
        """Whether the part is finished, and what was written is what is there."""
        try:
            stored = json.loads(self._path(name).read_text(encoding="utf-8"))
            return bool(stored["sha256"] == _digest(stored["value"], stored["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return False  # measured again, and said by nobody: it is as if it had not been

    def _path(self, name: str) -> Path:
        return self.folder / f"part-{name.replace('/', '_').replace(':', '-')}.json"


def _digest(value: Any, seconds: float) -> str:
    """Of what is read back: JSON has no tuples, and its keys are texts."""
    return digest(json.loads(json.dumps([value, seconds])))
