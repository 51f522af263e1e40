"""AWQ (arXiv:2306.00978) without running samples again: every grid point's loss comes from H.

A norm's output channels (or a linear's) are divided by s, the columns of the linears behind it
multiplied by s: the same function, rounded differently. The search takes the s that minimises the
sum over those linears of tr(E H ET), E = Q(W s) / s - W: the squared error of their outputs over
the calibration tokens. Candidates for s, and which modules belong together, are llm-compressor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.utils import match_modules_set
from llmcompressor.modeling.offset_norm import NormCalibrationModule, _is_registered
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
from torch.utils._pytree import tree_leaves

from quantize.engine.inputs import Inputs, Watch, bf16_products
from quantize.engine.nearest import BY_ROW, nearest, sample_rows
from quantize.engine.probe import Probe, parent_of

GRID = AWQModifier(mappings=[])._get_grid_search_params()
"""(ratio, whether weights count) of every candidate; the first is no scaling at all."""


FINALISTS = 5
"""Candidates that are tried on the probe's tokens."""

SAMPLED_ROWS = 256
"""Rows of a weight that the search looks at, evenly spaced."""


@dataclass(frozen=True)
class Mapping:
    """A module whose output channels can be scaled, and the modules that read them; by name."""

    smooth: str
    balance: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The best scales (columns,) float32, and the losses before and at them."""

    mapping: Mapping
    scales: torch.Tensor
    ratio: float
    loss_before: float
    loss: float


def mappings(
    layer: torch.nn.Module, known: list[AWQMapping], schemes: dict[str, QuantizationScheme]
) -> list[Mapping]:
    """Which modules of a layer are scaled together, in the order in which it is done.

    Left out, as upstream does: mappings none of whose readers is quantized, values whose heads are
    shared (v_proj's rows are not o_proj's columns), and per-tensor weight scales.
    """
    names = {module: name for name, module in layer.named_modules()}
    resolved = []
    for mapping in known:
        targets = (mapping.smooth_layer, *mapping.balance_layers)
        for (smooth,), *balance in match_modules_set(layer, targets):
            found = Mapping(names[smooth], tuple(names[m] for m in tree_leaves(balance)))
            if _fits(layer, found, schemes):
                resolved.append(found)
    return resolved


def _fits(layer: torch.nn.Module, mapping: Mapping, schemes: dict[str, QuantizationScheme]) -> bool:
    quantized = [schemes[name].weights for name in mapping.balance if name in schemes]
    if not any(quantized) or any(
        args.strategy == QuantizationStrategy.TENSOR for args in quantized if args is not None
    ):
        return False
    smooth = layer.get_submodule(mapping.smooth)
    if not isinstance(smooth, torch.nn.Linear):
        return True
    return all(
        layer.get_submodule(name).weight.shape[1] == smooth.out_features for name in mapping.balance
    )


def search(
    layer: torch.nn.Module, mapping: Mapping, watch: Watch, probe: Probe | None
) -> Found | None:
    """The best scales for one mapping; None where no token reached its modules.

    H tells the error of each linear's own output. What follows, attention or the MLP's product,
    weighs those errors differently; so with a `probe` the `FINALISTS` are run once more on its few
    tokens, and the one that changes the output of what holds the linears least is taken.
    """
    means = _mean(watch.of(mapping.balance[0]))
    readers = [
        (layer.get_submodule(name), watch.of(name))
        for name in mapping.balance
        if getattr(layer.get_submodule(name), "quantization_scheme", None) is not None
    ]
    terms = [
        _Term.of(module, inputs)
        for module, inputs in readers
        if inputs is not None and inputs.sampled
    ]
    if means is None or not terms:
        return None
    weights = AWQModifier._compute_layer_means([module for module, _ in readers])
    candidates = list(_candidates(means, weights.to(means.device, torch.float32)))
    with bf16_products():
        losses = [sum(float(term.loss(scales)) for term in terms) for _, scales in candidates]
    finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    ranked = sorted(finite, key=losses.__getitem__)
    if not ranked:
        return None
    best = ranked[0]
    if probe is not None and len(terms) > 1:
        best = min(
            ranked[:FINALISTS],
            key=lambda number: _nearest_outputs(mapping, terms, candidates[number][1], probe),
        )
    ratio, scales = candidates[best]
    return Found(mapping, scales, ratio, losses[0], losses[best])


def _nearest_outputs(
    mapping: Mapping, terms: list[_Term], scales: torch.Tensor, probe: Probe
) -> float:
    """What rounding all these linears at the scales does to the output of what holds them."""
    kept = [term.module.weight.data for term in terms]
    for term in terms:
        weight = term.module.weight
        rounded = nearest((weight * scales).to(weight.dtype), term.arguments)
        weight.data = (rounded / scales).to(rounded.dtype)
    changed = probe.change(parent_of(mapping.balance))
    for term, weight in zip(terms, kept, strict=True):
        term.module.weight.data = weight
    return changed


def _mean(inputs: Inputs | None) -> torch.Tensor | None:
    return inputs.absolute / inputs.tokens if inputs is not None and inputs.tokens else None


def _candidates(means: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    """(ratio, scales (columns,)) as llm-compressor computes them.

    :param means: mean |x| per column
    :param weights: mean of |w| per column, each group of weights normalised by its maximum
    """
    for ratio, with_weights in GRID:
        scales = means.pow(ratio)
        if with_weights:
            scales = scales / (weights.pow(1 - ratio) + 1e-4)
        scales = scales.clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield ratio, torch.where(torch.isfinite(scales), scales, 1.0)


@dataclass(frozen=True)
class _Term:
    """One linear's part of the loss, over some of its rows."""

    module: torch.nn.Module
    rows: torch.Tensor
    gram: torch.Tensor
    share: float  # sampled rows of all

    @classmethod
    def of(cls, module: torch.nn.Module, inputs: Inputs) -> _Term:
        by_row = module.quantization_scheme.weights.strategy in BY_ROW
        rows = sample_rows(module.weight, SAMPLED_ROWS) if by_row else module.weight
        gram, share = inputs.gram / inputs.sampled, len(rows) / len(module.weight)
        return cls(module, rows, gram, share)

    @property
    def arguments(self) -> QuantizationArgs:
        """How the linear is to be quantized."""
        arguments: QuantizationArgs = self.module.quantization_scheme.weights
        return arguments

    def loss(self, scales: torch.Tensor) -> torch.Tensor:
        """tr(E H ET) per token: the rows' sum, scaled up to all rows."""
        scaled = (self.rows * scales).to(self.rows.dtype)
        rounded = nearest(scaled, self.module.quantization_scheme.weights)
        error = (rounded / scales).to(self.rows.dtype).float() - self.rows.float()
        return ((error @ self.gram) * error).sum() / self.share


def apply(layer: torch.nn.Module, found: Found, watch: Watch) -> None:
    """Move the scales from the module in front into those behind it, and into their H."""
    scales = found.scales
    for name in found.mapping.balance:
        weight = layer.get_submodule(name).weight
        weight.copy_((weight * scales).to(weight.dtype))
    _divide(layer.get_submodule(found.mapping.smooth), scales)
    seen = set()
    for name in found.mapping.balance:
        inputs = watch.of(name)
        if inputs is not None and id(inputs) not in seen:
            seen.add(id(inputs))
            inputs.gram /= scales
            inputs.gram /= scales[:, None]
            inputs.absolute /= scales


def _divide(module: torch.nn.Module, scales: torch.Tensor) -> None:
    """Divide a norm's or a linear's output channels by the scales."""
    weight = module.weight
    if weight.ndim == 1:
        # Gemma's norms multiply by 1 + weight.
        offset = 1.0 if _is_registered(type(module).__name__, NormCalibrationModule) else 0.0
        weight.copy_((weight.float() + offset) / scales - offset)
    else:
        weight.copy_(weight.float() / scales[:, None])
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(module.bias.float() / scales)
