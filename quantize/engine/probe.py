"""A few tokens through a layer's parts, to see what rounding some weights does to their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

TOKENS = 1024


@dataclass(frozen=True)
class _Call:
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor


class Probe:
    """Calls of modules inside a layer, recorded from one forward pass before any weight changed."""

    def __init__(
        self,
        layer: torch.nn.Module,
        states: torch.Tensor,
        keywords: dict[str, Any],
        parents: Iterable[str],
    ) -> None:
        self._layer = layer
        self._calls: dict[str, _Call] = {}
        handles = []
        for name in set(parents):
            module = layer.get_submodule(name)
            handles.append(module.register_forward_hook(self._record(name), with_kwargs=True))
        try:
            layer(states, **keywords)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str) -> Any:
        def hook(
            module: torch.nn.Module, arguments: tuple[Any, ...], keywords: Any, output: Any
        ) -> None:
            self._calls[name] = _Call(arguments, keywords, _first(output))

        return hook

    def change(self, parent: str) -> float:
        """Sum over tokens of the squared distance of a module's output from what it was."""
        call = self._calls[parent]
        output = _first(self._layer.get_submodule(parent)(*call.arguments, **call.keywords))
        return float((output.float() - call.output.float()).square().sum())


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def parent_of(names: tuple[str, ...]) -> str:
    """The module that holds all of these and is called itself: not a list of experts."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    common = parts[0][:shared]
    if "experts" in common:
        common = common[: common.index("experts")]
    return ".".join(common)
