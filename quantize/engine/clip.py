"""AWQ's clipping (arXiv:2306.00978): how far each group's range is narrowed before it is rounded.

A narrower range rounds what is inside of it finer and cuts off what is outside. Each group of a
row takes the share of its range that minimises e H eT, e = Q(clamp(w)) - w, where H is the group's
own block of the inputs' Gram matrix: the squared error of the group's part of the output over the
calibration tokens, without running a token again. The shares tried, and that queries and keys are
left alone, are AutoAWQ's (`_search_best_clip`, 0.2.9): of those two the product counts, not each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

from quantize.engine.inputs import Inputs, bf16_products
from quantize.engine.nearest import nearest
from quantize.engine.support import NOT_CLIPPED

SHARES = tuple(1 - step / 20 for step in range(10))
"""Of a group's range, the whole one first."""

CHUNK = 1 << 24
"""Weights that are looked at together: 64 MB as float32, and a few times that on the way."""


@dataclass(frozen=True)
class Clipped:
    """What became of one linear: losses per token, and how many groups were narrowed."""

    loss_before: float
    loss: float
    share: float


def applies(name: str, arguments: QuantizationArgs) -> bool:
    """Whether a linear's ranges are narrowed: groups or rows with scales of their own."""
    own = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    last = name.rpartition(".")[2]
    return arguments.strategy in own and not any(part in last for part in NOT_CLIPPED)


def clip(weight: torch.Tensor, inputs: Inputs, arguments: QuantizationArgs) -> Clipped:
    """Clamp a weight (rows, columns) in place to the best range of each group.

    :param inputs: what calibration saw of its input, at least one token
    :param arguments: how the weight is to be quantized, see :func:`applies`
    """
    columns = weight.shape[1]
    size = arguments.group_size or columns
    groups = columns // size
    # (groups, size, size); a mean of the whole matrix would be another 4 columns^2 bytes
    blocks = torch.stack(
        [inputs.gram[at : at + size, at : at + size] for at in range(0, columns, size)]
    ).div_(inputs.sampled)
    before, after, narrowed = 0.0, 0.0, 0
    rows = max(1, CHUNK // columns)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        grouped = part.reshape(len(part), groups, size)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        best = torch.ones_like(low, dtype=torch.float32)
        lowest = first = _losses(part, part, blocks, arguments)
        for share in SHARES[1:]:
            losses = _losses(_narrowed(part, low, high, share), part, blocks, arguments)
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            best = torch.where(better[..., None], share, best)
        part.copy_(_narrowed(part, low, high, best))
        before, after = before + float(first.sum()), after + float(lowest.sum())
        narrowed += int((best < 1).sum())
    return Clipped(before, after, narrowed / (len(weight) * groups))


def _narrowed(
    part: torch.Tensor, low: torch.Tensor, high: torch.Tensor, share: torch.Tensor | float
) -> torch.Tensor:
    """Rows clamped to a share of each group's range, (rows, groups, 1) or one for all."""
    ends = [(end.float() * share).to(part.dtype) for end in (low, high)]
    return part.reshape(*low.shape[:2], -1).clamp(*ends).reshape(part.shape)


def _losses(
    tried: torch.Tensor, weight: torch.Tensor, blocks: torch.Tensor, arguments: QuantizationArgs
) -> torch.Tensor:
    """The error e H eT of each group of each row, (rows, groups) float32."""
    error = nearest(tried, arguments).float() - weight.float()
    by_group = error.reshape(len(weight), len(blocks), -1).transpose(0, 1)  # (groups, rows, size)
    with bf16_products():
        return ((by_group @ blocks) * by_group).sum(-1).T
