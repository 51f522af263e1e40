"""A checkpoint's shapes from its config alone, for models whose weights are not here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantize.architectures import COMPUTED, promised_tensors
from quantize.tensors import TensorInfo

CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs.json"
"""Shapes from the published config.json of the models that shipped recipes name, by repository."""


def known_config(repository: str) -> dict[str, Any] | None:
    """What the config of a repository says of shapes, without asking the Hub; None if unknown."""
    found: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return found.get(repository)


def tensors_of(config: Mapping[str, Any]) -> dict[str, TensorInfo] | None:
    """The tensors that a checkpoint with this config has, in BF16; None where none can tell."""
    architecture = (config.get("architectures") or [""])[0]
    promises = promised_tensors(architecture, config)
    if promises is None:
        return None
    return {
        name: TensorInfo(name, "BF16", one.shape, Path("model.safetensors"), 0, 2 * prod(one.shape))
        for name, one in promises.items()
        if one.required and not COMPUTED.search(name)
    }
