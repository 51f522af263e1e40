"""Rounding to nearest, by llm-compressor's observers and compressed-tensors' arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    fake_quantize,
    initialize_module_for_quantization,
)
from llmcompressor.modifiers.quantization.calibration import (
    apply_calibration_status,
    freeze_module_quantization,
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.observers import Observer
from llmcompressor.observers.helpers import fuse_weight_observers

SAMPLED_ROWS = 512
"""Rows of a weight that a search looks at, evenly spaced."""

BY_ROW = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR_GROUP,
)
"""Strategies in which a row's scales depend on that row alone, or on one number for all."""


def prepare(layer: torch.nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Give a filled layer's modules their schemes, observers and empty scales.

    `schemes` is by name within the layer. Forward passes stay unquantized.
    """
    for name, scheme in schemes.items():
        module = layer.get_submodule(name)
        initialize_module_for_quantization(module, scheme)
        module.quantization_enabled = False
        if scheme.weights is not None:
            initialize_observer(module, "weight")
        inputs = scheme.input_activations
        if inputs is not None and inputs.dynamic is not True and scheme.weights is not None:
            initialize_observer(module, "input")
        apply_calibration_status(module)
    fuse_weight_observers(layer)


def finish_scales(modules: Iterable[torch.nn.Module], bases: tuple[str, ...]) -> None:
    """Store the scales and zero points that the observers of these bases found."""
    update_qparams(list(modules), bases)


def round_weights(modules: Iterable[torch.nn.Module]) -> None:
    """Scales and zero points of the weights as they are; packing rounds with them."""
    modules = list(modules)
    observe(modules, "weight")
    update_qparams(modules, "weight")


def pack(module: torch.nn.Module) -> None:
    """Replace a module's weight by the tensors of its compressed format."""
    freeze_module_quantization(module)
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


def sample_rows(
    weight: torch.Tensor, args: QuantizationArgs, limit: int = SAMPLED_ROWS
) -> torch.Tensor:
    """At most `limit` evenly spaced rows, or all where rows depend on each other."""
    rows = len(weight)
    if rows <= limit or args.strategy not in BY_ROW:
        return weight
    picked = torch.linspace(0, rows - 1, limit, device=weight.device).round().long()
    return weight[picked]
