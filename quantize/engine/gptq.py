"""GPTQ (arXiv:2210.17323) on a Gram matrix that several linears share.

The weights minimise tr(E H ET), E = W - Q, column by column in the given order. With H = R D RT,
R unit upper triangular, that is the sum over columns k of d_k |(E R)_k|^2, where (E R)_k is
E_k + sum over j < k of E_j R_jk. So the best rounding of column k is that of
W_k + sum over j < k of E_j R_jk. It is the recurrence of GPTQ, which gets its coefficients from the
Cholesky factor of H's inverse (the equivalence: QuIP, arXiv:2307.13304, theorem 6), without
inverting H: one Cholesky factorisation of H in reverse order, n^3/3 instead of 4n^3/3
multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
    fake_quantize,
)
from compressed_tensors.quantization.utils import calculate_range

Rounding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(values, scale, zero point or None), each (rows,) float32 → the nearest values (rows,)."""

BLOCK = 64
"""Columns whose influence on each other is added one by one; that of all before is one product."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points per row and per group of columns.

    `scale` (groups, rows) float32, `zero` the same or None, `group` (columns,) int64.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None
    group: torch.Tensor

    @classmethod
    def of(
        cls,
        shape: torch.Size,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        global_scale: torch.Tensor | None,
        args: QuantizationArgs,
    ) -> Grid:
        """From what an observer computed for a weight of this shape, for any strategy."""
        rows, columns = shape
        group = torch.zeros(columns, dtype=torch.long, device=scale.device)
        match args.strategy:
            case QuantizationStrategy.GROUP | QuantizationStrategy.TENSOR_GROUP:
                group = torch.arange(columns, device=scale.device) // args.group_size
            case QuantizationStrategy.BLOCK:
                height, width = args.block_structure
                group = torch.arange(columns, device=scale.device) // width
                scale = scale.repeat_interleave(height, dim=0)[:rows]
                zero_point = zero_point.repeat_interleave(height, dim=0)[:rows]
            case QuantizationStrategy.TENSOR:
                scale = scale.reshape(1, 1).expand(rows, 1)
                zero_point = zero_point.reshape(1, 1).expand(rows, 1)
        scale = scale.float()
        if global_scale is not None:
            scale = scale / global_scale.reshape(()).float()
        zero = None if args.symmetric else zero_point.float().T.contiguous()
        return cls(scale.T.contiguous(), zero, group)


def stack(grids: list[Grid]) -> Grid:
    """One grid for several weights that stand on top of each other."""
    zero = None
    if grids[0].zero is not None:
        zero = torch.cat([grid.zero for grid in grids if grid.zero is not None], dim=1)
    return Grid(torch.cat([grid.scale for grid in grids], dim=1), zero, grids[0].group)


def quantize(
    weight: torch.Tensor,
    gram: torch.Tensor,
    grid: Grid,
    args: QuantizationArgs,
    dampening: float,
    multiplied_in: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, bool]:
    """Rounded weights (rows, columns) float32, and whether H could not be factorised.

    :param weight: (rows, columns) float32
    :param gram: (columns, columns) float32, H; read only
    :param dampening: share of H's mean diagonal that is added to it
    :param multiplied_in: what integers are multiplied by their scale in, where they are used
    Where H is not positive definite even so, columns are rounded to nearest, as upstream does.
    """
    columns = weight.shape[1]
    diagonal = gram.diagonal()
    dead = diagonal == 0
    order = torch.arange(columns, device=gram.device)
    if args.actorder is not None:
        order = torch.argsort(diagonal, descending=True)
    factor = _factor(gram, order, dead, dampening)
    transposed = weight.T[order].contiguous()
    transposed[dead[order]] = 0
    rounded = _columns(transposed, factor, grid, grid.group[order], _rounding(args, multiplied_in))
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T.contiguous(), factor is None


def _factor(
    gram: torch.Tensor, order: torch.Tensor, dead: torch.Tensor, dampening: float
) -> torch.Tensor | None:
    """R, unit upper triangular (columns, columns), of the reordered and dampened H = R D RT."""
    backward = order.flip(0)
    matrix = gram[backward][:, backward]
    diagonal = matrix.diagonal()
    diagonal[dead[backward]] = 1.0
    diagonal += dampening * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(matrix, check_errors=False)
    if int(info):
        return None
    upper = lower.flip(0, 1)
    return upper.div_(upper.diagonal().clone())


def _columns(
    weight: torch.Tensor,
    factor: torch.Tensor | None,
    grid: Grid,
    group: torch.Tensor,
    rounding: Rounding,
) -> torch.Tensor:
    """The recurrence. `weight` (columns, rows): a column is contiguous."""
    columns, rows = weight.shape
    rounded = torch.empty_like(weight)
    error = torch.empty_like(weight)
    recorded = None
    if weight.is_cuda and factor is not None and isinstance(rounding, _ToInteger):
        recorded = _Recorded.of(rows, grid.zero is not None, rounding, weight.device)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        wanted = weight[part]
        if factor is not None and start:
            wanted = torch.addmm(wanted, factor[:start, part].T, error[:start])
        block = _Block(
            weight[part],
            wanted,
            factor[part, part] if factor is not None else None,
            grid.scale[group[part]],
            grid.zero[group[part]] if grid.zero is not None else None,
        )
        if recorded is not None and len(wanted) == BLOCK:
            recorded.round(block, rounded[part], error[part])
        else:
            block.round(rounding, rounded[part], error[part])
    return rounded


@dataclass(frozen=True)
class _Block:
    """Neighbouring columns (columns, rows) float32, and the factor among them or None."""

    weight: torch.Tensor
    wanted: torch.Tensor  # the weight, and what the columns of the blocks before are to it
    factor: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor | None

    def round(self, rounding: Rounding, rounded: torch.Tensor, error: torch.Tensor) -> None:
        """Fill `rounded` and `error`, (columns, rows)."""
        for column, target in enumerate(self.wanted):
            if self.factor is not None and column:
                target = torch.addmv(target, error[:column].T, self.factor[:column, column])
            zero = self.zero[column] if self.zero is not None else None
            rounded[column] = rounding(target, self.scale[column], zero)
            torch.sub(self.weight[column], rounded[column], out=error[column])


class _Recorded:
    """:meth:`_Block.round` of a whole block as a CUDA graph, on tensors of its own.

    A column is a dozen kernels of some two microseconds. Python takes several times as long to
    start one: 4.4 of the 11.6 seconds that a layer of an 8B took on an H200.
    """

    def __init__(self, block: _Block, rounding: Rounding) -> None:
        self._block = block
        self._rounded, self._error = torch.empty_like(block.weight), torch.empty_like(block.weight)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what a library sets up at its first call is not recorded
            block.round(rounding, self._rounded, self._error)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads read ahead, and watch over NCCL.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            block.round(rounding, self._rounded, self._error)

    @classmethod
    @cache
    def of(cls, rows: int, zero: bool, rounding: _ToInteger, device: torch.device) -> _Recorded:
        """The one for so many rows: made once, for layers are alike."""
        weight, wanted, scale, zeros = torch.ones(4, BLOCK, rows, device=device)
        factor = torch.zeros(BLOCK, BLOCK, device=device)
        return cls(_Block(weight, wanted, factor, scale, zeros if zero else None), rounding)

    def round(self, block: _Block, rounded: torch.Tensor, error: torch.Tensor) -> None:
        """What `block.round` does."""
        for mine, given in zip(vars(self._block).values(), vars(block).values(), strict=True):
            if mine is not None:
                mine.copy_(given)
        self._graph.replay()
        rounded.copy_(self._rounded)
        error.copy_(self._error)


@dataclass(frozen=True)
class _ToInteger:
    """The nearest values on a grid of integers, in compressed-tensors' order of operations."""

    lowest: float
    highest: float
    multiplied_in: torch.dtype

    def __call__(
        self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        """:data:`Rounding`."""
        steps = values / scale
        if zero is not None:
            steps += zero
        steps.round_().clamp_(self.lowest, self.highest)
        if zero is not None:
            steps -= zero
        steps *= scale
        # Off by a hundredth of a step at most, and still worth a tenth of the KL divergence: along
        # the dominant directions of H, GPTQ gets the error down to sums of such hundredths.
        return steps if self.multiplied_in == torch.float32 else steps.to(self.multiplied_in)


def _rounding(args: QuantizationArgs, multiplied_in: torch.dtype) -> Rounding:
    """The nearest values on the grid, in compressed-tensors' order of operations, for ties."""
    if args.type == QuantizationType.INT:
        lowest, highest = (float(bound) for bound in calculate_range(args, "cpu"))
        return _ToInteger(lowest, highest, multiplied_in)
    per_row = copy(args)
    per_row.strategy = QuantizationStrategy.CHANNEL

    def to_float(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        columns = None if zero is None else zero[:, None]
        return fake_quantize(values[:, None], scale[:, None], columns, per_row)[:, 0]

    return to_float
