"""A config.json for transformers 5 → what transformers 4.51 makes the same model of.

transformers ignores keys that it does not know: read as it is, such a file silently gives the
default rotary base. Standard library only: the core reads this, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NotTheSame(ValueError):
    """Transformers 4.51 would make another model of this config."""


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model in the older keys; what is written in them already stays as it is.

    `dtype` was `torch_dtype`; `rope_parameters` was `rope_theta`, `partial_rotary_factor` and, with
    a type other than default, `rope_scaling` (transformers 5, `modeling_rope_utils.py`).
    `layer_types` was implied by other keys; NotTheSame where it says something else than they do,
    and for rotary parameters of each kind of layer, which 4.51 has none of.
    """
    old = {key: value for key, value in config.items() if key != "layer_types"}
    if "dtype" in old:
        old.setdefault("torch_dtype", old["dtype"])
        del old["dtype"]
    rope = old.pop("rope_parameters", None)
    if rope is not None:
        old |= _rope(rope)
    types = config.get("layer_types")
    if types is not None and list(types) != _implied_types(config, len(types)):
        raise NotTheSame("its layer_types mix kinds of attention that transformers 4.51 has not")
    return old


def _rope(rope: Any) -> dict[str, Any]:
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise NotTheSame("its rope_parameters differ from layer to layer")
    rest = dict(rope)
    kind = rest.get("rope_type", rest.pop("type", "default"))
    old = {key: rest.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rest}
    return old | {"rope_scaling": None if kind == "default" else rest | {"rope_type": kind}}


def _implied_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """What 4.51's models do: Gemma 2 every second layer, Qwen from max_window_layers on."""
    full, sliding = "full_attention", "sliding_attention"
    if config.get("model_type") == "gemma2":
        return [full if layer % 2 else sliding for layer in range(layers)]
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        first = config.get("max_window_layers", layers)
        return [sliding if layer >= first else full for layer in range(layers)]
    return [full] * layers
