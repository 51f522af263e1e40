"""A request's method and schemes → llm-compressor's modifiers and compressed-tensors' config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from quantize.modules import matches

KV_CACHE = {
    "fp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "observer": "static_minmax",
    },
}
"""One static scale a layer for keys and one for values, over all that calibration saw."""


def scheme(name: str, group_size: int | str | None, targets: list[str]) -> QuantizationScheme:
    """A preset of compressed-tensors; `group_size` is columns per scale, or "channel"."""
    made = preset_name_to_scheme(name, targets)
    if group_size == "channel":
        made.weights.strategy = QuantizationStrategy.CHANNEL.value
        made.weights.group_size = None
    elif group_size is not None:
        made.weights.group_size = group_size
    return made


def config_groups(body: dict[str, Any], linears: Sequence[str]) -> dict[str, QuantizationScheme]:
    """One group for each override and, last, the one of all other linears.

    :param linears: names of the model's linear modules
    A name or a pattern wins over the class name in compressed-tensors and in vLLM. Of several
    patterns that match, compressed-tensors takes the first in the alphabet and vLLM that of the
    first group; so an override whose modules another one names, too, gets its modules' own names
    as targets, in a group in front: for both, and for both engines, the first override wins.
    """
    named: list[QuantizationScheme] = []
    by_pattern: list[QuantizationScheme] = []
    overrides = body["overrides"]
    for number, override in enumerate(overrides):
        others = [other["modules"] for other in overrides if other is not override]
        before = [other["modules"] for other in overrides[:number]]
        reached = [name for name in linears if matches(name, override["modules"])]
        own = [name for name in reached if not any(matches(name, names) for names in before)]
        overlaps = any(matches(name, names) for name in reached for names in others)
        targets = own if overlaps else list(override["modules"])
        if own:
            made = scheme(override["scheme"], override["group_size"], targets)
            (named if overlaps else by_pattern).append(made)
    groups = [*named, *by_pattern, scheme(body["scheme"], body["group_size"], ["Linear"])]
    return {f"group_{index}": group for index, group in enumerate(groups)}


def modifiers(body: dict[str, Any], model: torch.nn.Module) -> list[Any]:
    """What `oneshot` takes for this model; the last one quantizes."""
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    groups = config_groups(body, linears)
    common: dict[str, Any] = {"config_groups": groups, "ignore": list(body["ignore"])}
    if body["kv_cache"] is not None:
        common["kv_cache_scheme"] = QuantizationArgs(**KV_CACHE[body["kv_cache"]])
    order = None if body["activation_order"] == "none" else body["activation_order"]
    gptq = {"dampening_frac": body["dampening"], "actorder": order}
    match body["method"]:
        case "awq":
            return [AWQModifier(), QuantizationModifier(**common)]
        case "awq+gptq":
            return [AWQModifier(), GPTQModifier(**common, **gptq)]
        case "gptq" | "int8":
            return [GPTQModifier(**common, **gptq)]
        case "rtn" | "fp8":
            return [QuantizationModifier(**common)]
        case other:
            raise ValueError(f"unknown method {other}")


def quantization_config(body: dict[str, Any], model: torch.nn.Module) -> QuantizationConfig:
    """The config that `oneshot` would give the model: observers and activation order filled in."""
    return modifiers(body, model)[-1].resolved_config
