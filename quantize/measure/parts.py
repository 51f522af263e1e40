"""Finished parts of a measurement, kept in the stage's scratch folder across a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.protocol import write_json


@dataclass
class Parts:
    """One JSON file a part; a part that is there is not measured again."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part's value, made now if it is not there yet."""
        path = self._path(name)
        if not path.exists():
            started = time.monotonic()
            value = make()
            write_json(path, {"value": value, "seconds": time.monotonic() - started})
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.seconds[name] = stored["seconds"]
        return stored["value"]

    def has(self, name: str) -> bool:
        """Whether the part is finished."""
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self.folder / f"part-{name.replace('/', '_').replace(':', '-')}.json"
