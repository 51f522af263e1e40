"""Data and oracles that the engine's checks share: inputs with outliers, packed weights.

Everything follows from the generator's seed. Nothing here calls the engine.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from llmcompressor.modifiers.quantization.calibration import (
    initialize_observer,
    observe,
    update_qparams,
)


def preset(name: str, group_size: int | str | None) -> QuantizationScheme:
    """A preset of compressed-tensors with another group size."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    if group_size == "channel":
        scheme.weights.strategy, scheme.weights.group_size = "channel", None
    elif group_size is not None:
        scheme.weights.group_size = group_size
    return scheme


def activations(tokens: int, columns: int, seed: int, *, outliers: int = 4) -> torch.Tensor:
    """BF16 (tokens, columns): correlated channels of unequal size, `outliers` of them 40 times.

    Half of the variance lies in columns // 8 directions, so the Gram matrix is ill-conditioned.
    """
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, columns // 8, generator=random)
    mixing = torch.randn(columns // 8, columns, generator=random) / (columns // 8) ** 0.5
    x = shared @ mixing + torch.randn(tokens, columns, generator=random)
    x *= torch.randn(columns, generator=random).mul(0.7).exp()
    x[:, torch.randperm(columns, generator=random)[:outliers]] *= 40
    return x.to(torch.bfloat16)


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """BF16 (rows, columns), rows of unequal size, a few large values."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    weight *= torch.randn(rows, 1, generator=random).mul(0.3).exp()
    large = torch.rand(rows, columns, generator=random) < 0.002
    return torch.where(large, weight * 6, weight).to(torch.bfloat16)


def packed(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[torch.nn.Linear, int]:
    """A linear as compressed-tensors stores it, and the bytes of its tensors."""
    rows, columns = weight.shape
    module = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    initialize_module_for_quantization(module, scheme)
    initialize_observer(module, "weight")
    observe(module, "weight")
    update_qparams(module, "weight")
    del module.weight_observer
    module.quantization_status = QuantizationStatus.FROZEN
    compress_module(module)
    total = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return module, total


def stored(weight: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """The weight after packing and unpacking: rounded to nearest, BF16."""
    module, _ = packed(weight, scheme)
    decompress_module(module)
    return module.weight.detach()


def output_error(error: torch.Tensor, x: torch.Tensor) -> float:
    """Sum over tokens x (tokens, columns) of |E x|^2, in float64."""
    return float((x.double() @ error.double().T).square().sum())


def relative(found: float, expected: float) -> float:
    """|found / expected - 1|."""
    return abs(found / expected - 1)
