"""A request's method and schemes → llm-compressor's modifiers and compressed-tensors' config."""

from __future__ import annotations

from typing import Any

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


def config_groups(body: dict[str, Any]) -> dict[str, QuantizationScheme]:
    """One group for each override, in their order, and last the one of all other linears.

    A name or a pattern wins over the class name in compressed-tensors and in vLLM, and of several
    patterns the first.
    """
    groups = [
        scheme(override["scheme"], override["group_size"], list(override["modules"]))
        for override in body["overrides"]
    ]
    groups.append(scheme(body["scheme"], body["group_size"], ["Linear"]))
    return {f"group_{index}": group for index, group in enumerate(groups)}


def modifiers(body: dict[str, Any]) -> list[Any]:
    """What `oneshot` takes; the last one quantizes."""
    common: dict[str, Any] = {"config_groups": config_groups(body), "ignore": list(body["ignore"])}
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


def quantization_config(body: dict[str, Any]) -> QuantizationConfig:
    """The config that `oneshot` would give the model: observers and activation order filled in."""
    return modifiers(body)[-1].resolved_config
