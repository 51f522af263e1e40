"""The quantized linears of a checkpoint's files, whatever the format they are stored in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.artifact_formats import FORMATS, ArtifactFormat, Facts, Grid, format_of
from quantize.checkpoint import Checkpoint
from quantize.errors import SourceError
from quantize.formats import FLOAT_SCALES, Layout, WeightFormat
from quantize.modules import module_name
from quantize.quantization import Quantize
from quantize.tensors import TensorInfo, load_tensor, to_float32

Parts = Mapping[str, TensorInfo]
"""Tensor of a module (`weight_packed`, `qweight`, ...) → where it is."""

CACHE_SCALES = (".k_scale", ".v_scale")
"""Of an FP8 KV cache; they belong to attention modules, which are no linears."""


@dataclass(frozen=True)
class Stored:
    """A format, and what this checkpoint's `quantization_config` says in it."""

    format: ArtifactFormat
    block: Mapping[str, Any]

    def layout(self, form: WeightFormat, shape: tuple[int, ...], scale_dtype: str) -> Layout:
        """All tensors of a quantized module but its bias."""
        return self.format.layout(form, shape, scale_dtype)

    def dequantized_rows(
        self,
        form: WeightFormat,
        tensors: Parts,
        rows: npt.NDArray[np.int64],
        shape: tuple[int, ...],
    ) -> npt.NDArray[np.float32]:
        """Rows (n, in) of a weight (out, in) that a server computes with, in FP32."""
        if self.format is FORMATS["compressed-tensors"]:  # which has more than integers
            return form.dequantized_rows(tensors, rows, shape[1])
        grid = self.grid(form, tensors, shape)
        return grid.dequantized(rows, to_float32(grid.scale, tensors[self.format.SCALE].dtype))

    def grid(self, form: WeightFormat, tensors: Parts, shape: tuple[int, ...]) -> Grid:
        """The numbers of a linear; SourceError where its tensors contradict each other."""
        rows, columns = shape
        arrays = {suffix: load_tensor(info) for suffix, info in tensors.items()}
        try:
            return self.format.read(facts_of(form), (rows, columns), arrays, self.block)
        except ValueError as error:
            name = module_name(next(iter(tensors.values())).name)
            raise SourceError(
                f"{name} cannot be read as {self.format.NAME}: {error}",
                "quantize the checkpoint that it was made from",
            ) from error

    def scales(
        self, form: WeightFormat, tensors: Parts
    ) -> Iterator[tuple[TensorInfo, npt.NDArray[np.float32]]]:
        """Every tensor of scales of a linear, with its values."""
        for suffix, info in tensors.items():
            if suffix.endswith("_scale"):
                yield info, form.scale_values(load_tensor(info), info.dtype, suffix)
            elif suffix == self.format.SCALE:
                yield info, to_float32(np.asarray(load_tensor(info)), info.dtype)


def stored_as(quantize: Quantize, config: Mapping[str, Any]) -> Stored:
    """What a recipe's result is stored as; `config` is its `config.json`."""
    block = config.get("quantization_config")
    return Stored(format_of(quantize.effective_format), block if isinstance(block, Mapping) else {})


def facts_of(form: WeightFormat) -> Facts:
    """What the other formats' configs say of a number format."""
    return Facts(form.bits, form.group_size, form.symmetric)


def form_of(facts: Facts) -> WeightFormat:
    """The number format of integers that leave activations alone."""
    name = f"W{facts.bits}A16" + ("" if facts.symmetric else "_ASYM")
    strategy: Literal["group", "channel"] = "group" if facts.group_size else "channel"
    size = facts.group_size
    return WeightFormat(name, "pack-quantized", facts.bits, strategy, size, facts.symmetric)


def modules_of(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Module → its tensors by suffix; scales of a KV cache are left out."""
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if not name.endswith(CACHE_SCALES):
            module = module_name(name)
            modules[module][name.removeprefix(module).lstrip(".")] = info
    return modules


@dataclass(frozen=True)
class Linear:
    """A quantized linear of a checkpoint: its number format, its shape (out, in), its tensors."""

    form: WeightFormat
    shape: tuple[int, int]
    tensors: dict[str, TensorInfo]  # without its bias


def read_linears(checkpoint: Checkpoint) -> tuple[Stored, dict[str, Linear]]:
    """How a checkpoint is stored, and its quantized linears by module, from its files alone.

    SourceError where it is not quantized, in a format that is not read, or not as its config says.
    A grid that a config calls asymmetric stays so, even where all its zero points are in the
    middle.
    """
    stored = stored_in(checkpoint)
    linears: dict[str, Linear] = {}
    faults: list[str] = []
    for module, parts in modules_of(checkpoint.tensors).items():
        if stored.format.SCALE not in parts:
            continue
        tensors = {suffix: info for suffix, info in parts.items() if suffix != "bias"}
        try:
            linears[module] = _linear(stored, module, tensors)
        except ValueError as error:
            faults.append(f"{module}: {error}")
    if faults:
        raise _unreadable(checkpoint, faults)
    if not linears:
        raise _unreadable(checkpoint, [f"no module has {stored.format.SCALE}"])
    return stored, linears


def stored_in(checkpoint: Checkpoint) -> Stored:
    """How a checkpoint says it is stored; a SourceError where it is not quantized, or otherwise."""
    block = checkpoint.config.get("quantization_config")
    if not isinstance(block, Mapping):
        raise SourceError(
            f"the checkpoint in {checkpoint.folder} is not quantized (config.json has no "
            "quantization_config)",
            "quantize it with a recipe: quantize init",
        )
    method = block.get("quant_method")
    for one in FORMATS.values():
        if method == one.METHOD:
            return Stored(one, block)
    raise SourceError(
        f"the checkpoint in {checkpoint.folder} is stored as {method!r}",
        f"formats that can be read: {', '.join(FORMATS)}",
    )


def _linear(stored: Stored, module: str, tensors: dict[str, TensorInfo]) -> Linear:
    """ValueError where names, dtypes and shapes are not what the config promises."""
    facts = stored.format.facts(stored.block, module)
    for needed in stored.format.SHAPED:
        if needed not in tensors or len(tensors[needed].shape) not in (1, 2):
            raise ValueError(f"it has no {needed}, or not in two dimensions")
    arrays = {suffix: load_tensor(info) for suffix, info in tensors.items()}
    shape, form = stored.format.shape(facts, arrays), form_of(facts)
    size = facts.group_size
    if 0 in shape or (size is not None and shape[1] % size):
        raise ValueError(f"groups of {size} do not divide its shape {list(shape)}")
    layout = stored.layout(form, shape, "BF16")
    for suffix, (dtype, extents) in layout.items():
        info = tensors.get(suffix)
        if info is None:
            raise ValueError(f"it has no {suffix}")
        dtypes: Sequence[str] = FLOAT_SCALES if suffix == stored.format.SCALE else (dtype,)
        if info.dtype not in dtypes or info.shape != extents:
            raise ValueError(
                f"{suffix} is {info.dtype} {list(info.shape)}, not {dtype} {list(extents)}"
            )
    more = tensors.keys() - layout.keys()
    if more:
        raise ValueError(f"{sorted(more)[0]} is not expected")
    return Linear(form, shape, tensors)


def _unreadable(checkpoint: Checkpoint, faults: Sequence[str]) -> SourceError:
    more = f"; and {len(faults) - 3} more" if faults[3:] else ""
    return SourceError(
        f"the checkpoint in {checkpoint.folder} cannot be converted: {'; '.join(faults[:3])}{more}",
        "docs/formats.md says what each format holds",
    )
