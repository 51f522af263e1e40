"""What an engine's module says of it. Standard library alone: the recipe reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from quantize.quantization import Quantize


class Engine(Protocol):
    """A module of this package with these names at its top level.

    A module may also offer `cannot_hold(module, shape) -> str | None`: why it cannot quantize a
    linear of this name and shape (out_features, in_features).
    """

    NAME: str
    SAID: str  # what a card calls it
    ENVIRONMENT: str
    WORKER: str  # module of quantize.workers
    FORMAT: str  # what it writes, a name in quantize.artifact_formats
    METHODS: Mapping[str, tuple[str, ...]]  # method → schemes that it produces, best first

    def cannot_do(self, quantize: Quantize) -> str | None:
        """Which part of the recipe's block this engine cannot do, or None."""
        ...

    def cannot_read(self, config: Mapping[str, Any]) -> str | None:
        """Why it cannot load a checkpoint with this config.json, or None."""
        ...
