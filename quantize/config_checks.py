"""Does an artifact's config.json describe its tensors, and the model as the source does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.artifact_checks import Check
from quantize.artifact_formats.compressed_tensors import groups_of
from quantize.formats import WeightFormat
from quantize.modules import matches
from quantize.stored import Stored, facts_of

TOLERATED = frozenset(
    {"quantization_config", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}
)
"""Keys of config.json that quantizing changes: the rest of what both sides state is equal."""

KV_CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}


def check_quantization_config(
    config: dict[str, Any],
    quantized: Mapping[str, WeightFormat],
    kept_modules: Sequence[str],
    stored: Stored,
    *,
    kv_cache: bool = False,
) -> Check:
    """`quantization_config` tells a server the format that each module's tensors have.

    `quantized` are the modules with their formats, `kept_modules` the linears without one.
    """
    name = "quantization_config"
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return Check(name, False, "config.json has none: servers would read the model as BF16")
    if stored.format.NAME != "compressed-tensors":
        facts = {module: facts_of(form) for module, form in quantized.items()}
        try:
            faults = stored.format.config_faults(stated, facts, kept_modules)
        except ValueError as error:  # not in the form that the format's config has
            faults = [str(error)]
        return _config_check(quantized, faults, stored.format.NAME)
    compressions = {form.compression for form in quantized.values()}
    whole = compressions.pop() if len(compressions) == 1 else "mixed-precision"
    faults = _differences({"quant_method": "compressed-tensors", "format": whole}, stated)
    faults += _group_faults(stated, quantized, whole)
    ignore = stated.get("ignore") or []
    unlisted = [module for module in kept_modules if not matches(module, ignore)]
    if unlisted:
        faults.append(f"ignore lacks {', '.join(unlisted[:3])}, which is not quantized")
    cache = stated.get("kv_cache_scheme")
    if kv_cache:
        faults += [f"kv_cache_scheme.{fault}" for fault in _differences(KV_CACHE, cache or {})]
    elif cache is not None:
        faults.append("kv_cache_scheme is there, though the recipe does not ask for it")
    more = ["FP8 KV cache"] if kv_cache else []
    return _config_check(quantized, faults, whole, *more)


def _config_check(
    quantized: Mapping[str, WeightFormat],
    faults: Sequence[str],
    whole: str,
    *also: str,
) -> Check:
    schemes = sorted({form.scheme for form in quantized.values()})
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    said = "; ".join(faults[:5]) + more or ", ".join([whole, *schemes, *also])
    return Check("quantization_config", not faults, said)


def _group_faults(
    stated: dict[str, Any], quantized: Mapping[str, WeightFormat], whole: str
) -> list[str]:
    """Where the group that a reader takes for a module does not state its format."""
    groups = stated.get("config_groups") or {}
    if not groups:
        return ["no config_groups"]
    faults: dict[str, str] = {}  # what is wrong → the first module that it concerns
    for module, form in quantized.items():
        candidates = groups_of(module, groups)
        if not candidates:
            faults.setdefault("no config group names", module)
        for key in candidates:
            for fault in _differences_from(form, groups[key], whole):
                faults.setdefault(f"{key}.{fault}", module)
    return [f"{fault} ({module})" for fault, module in faults.items()]


def states_format(form: WeightFormat, group: Any, whole: str) -> bool:
    """Whether a config group states this format; `whole` is the format of the whole config."""
    return isinstance(group, dict) and not _differences_from(form, group, whole)


def _differences_from(form: WeightFormat, group: dict[str, Any], whole: str) -> list[str]:
    weights = {
        "num_bits": form.bits,
        "type": form.number,
        "strategy": form.strategy,
        "symmetric": form.symmetric,
        "group_size": form.group_size,
    }
    faults = [f"weights.{fault}" for fault in _differences(weights, group.get("weights") or {})]
    if (group.get("format") or whole) != form.compression:
        faults.append(f"format is {group.get('format')!r}, not {form.compression!r}")
    activations = group.get("input_activations")
    found = None if not activations else "dynamic" if activations.get("dynamic") else "static"
    if found != form.activations:
        faults.append(f"input_activations is {found or 'absent'}, not {form.activations}")
    return faults


def check_model_config(source: dict[str, Any], artifact: dict[str, Any]) -> Check:
    """Whatever both configs state of the model is equal; a rewrite may add defaults."""
    both = (source.keys() & artifact.keys()) - TOLERATED
    faults = _differences({key: source[key] for key in sorted(both)}, artifact)
    if _rope_theta(source) != _rope_theta(artifact):
        faults.append(f"rope_theta {_rope_theta(source)} became {_rope_theta(artifact)}")
    return Check("model config", not faults, "; ".join(faults) or f"{len(both)} keys are equal")


def _rope_theta(config: dict[str, Any]) -> Any:
    """Transformers 5 moves it from the top level into rope_parameters."""
    nested = config.get("rope_parameters")
    inside = nested.get("rope_theta") if isinstance(nested, dict) else None
    return config.get("rope_theta", inside)


def _differences(promised: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    return [
        f"{key} is {stated.get(key)!r}, not {value!r}"
        for key, value in promised.items()
        if stated.get(key) != value
    ]
