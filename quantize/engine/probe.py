"""A few tokens through a layer's parts, to see what rounding some weights does to their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

TOKENS = 1024


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
        self._arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        handles = []
        for name in set(parents):
            module = layer.get_submodule(name)
            called, returned = self._record(name)
            # First of all hooks: that of a quantized KV cache puts itself among the arguments.
            handles.append(module.register_forward_pre_hook(called, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(returned))
        try:
            layer(states, **keywords)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str) -> tuple[Any, Any]:
        """Hooks for before and after a module's forward."""

        def called(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: Any) -> None:
            self._arguments[name] = (arguments, dict(keywords))

        def returned(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            self._outputs[name] = _first(output)

        return called, returned

    def change(self, parent: str) -> float:
        """Sum over tokens of the squared distance of a module's output from what it was."""
        arguments, keywords = self._arguments[parent]
        output = _first(self._layer.get_submodule(parent)(*arguments, **keywords))
        return float((output.float() - self._outputs[parent].float()).square().sum())


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
