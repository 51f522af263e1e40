"""Rounding to nearest, by llm-compressor's observers and compressed-tensors' arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.modeling.kvcache import register_key_hook, register_value_hook
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    fake_quantize,
    initialize_module_for_quantization,
)
from llmcompressor.modifiers.quantization.calibration import (
    apply_calibration_status,
    calibrate_key_hook,
    calibrate_value_hook,
    freeze_module_quantization,
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.observers import Observer
from llmcompressor.observers.helpers import fuse_weight_observers

BY_ROW = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR_GROUP,
)
"""Strategies in which a row's scales depend on that row alone, or on one number for all."""


def prepare(layer: torch.nn.Module, schemes: dict[str, QuantizationScheme]) -> list[Any]:
    """Give a filled layer's modules their schemes, observers and empty scales.

    `schemes` is by name within the layer. Forward passes stay unquantized. Returns the handles of
    the hooks that watch keys and values; remove them when the calibration data has passed.
    """
    handles = []
    for name, scheme in schemes.items():
        module = layer.get_submodule(name)
        initialize_module_for_quantization(module, scheme, force_zero_point=bool(scheme.weights))
        module.quantization_enabled = False
        inputs = scheme.input_activations
        if scheme.weights is None:  # an attention whose keys and values are cached in FP8
            initialize_observer(module, "k")
            initialize_observer(module, "v")
            handles.append(register_key_hook(module, calibrate_key_hook))
            handles.append(register_value_hook(module, calibrate_value_hook))
        else:
            initialize_observer(module, "weight")
            if inputs is not None and inputs.dynamic is not True:
                initialize_observer(module, "input")
        apply_calibration_status(module)
    fuse_weight_observers(layer)
    return handles


def round_weights(modules: Iterable[torch.nn.Module]) -> None:
    """Scales and zero points of the weights as they are; packing rounds with them."""
    modules = list(modules)
    observe(modules, "weight")
    update_qparams(modules, "weight")


def pack(module: torch.nn.Module) -> None:
    """Drop a module's observers; replace its weight by the tensors of its compressed format."""
    freeze_module_quantization(module)
    if module.quantization_scheme.weights is not None:
        compress_module(module)


def nearest(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The weight (rows, columns) rounded to nearest and back, in its own dtype.

    Scales are from its minima and maxima. A few rows may stand for all where `args.strategy` is in
    `BY_ROW`.
    """
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
    observer(weight)
    found = observer.get_qparams()
    return fake_quantize(
        weight, found["scale"], found["zero_point"], args, global_scale=found["global_scale"]
    )


def sample_rows(weight: torch.Tensor, limit: int) -> torch.Tensor:
    """At most `limit` evenly spaced rows (limit, columns)."""
    rows = len(weight)
    if rows <= limit:
        return weight
    picked = torch.linspace(0, rows - 1, limit, device=weight.device).round().long()
    return weight[picked]
