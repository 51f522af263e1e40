"""AutoAWQ's `gemm` layout: 4 bits, always with zero points.

Of a weight (out, in): `qweight` int32 (in, out / 8), `qzeros` int32 (groups, out / 8), `scales`
(groups, out). Nibble i of a word belongs to output 8 * word + ORDER[i]
(AutoAWQ 0.2.9, `awq/modules/linear/gemm.py`, from_linear; `awq/utils/packing_utils.py`).

vLLM 0.32 (`auto_awq.py`) takes 4 bits alone, and scales in the model's dtype, BF16 or FP16. It
skips linears whose name has an entry of `modules_to_not_convert` in it; transformers
(`quantizers_utils.py`, should_convert_module) those that begin or end with one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantize.artifact_formats.base import (
    HALVES,
    Arrays,
    Facts,
    Grid,
    column_blocks,
    common,
    differences,
    pieces,
    stores_group_index,
    to_words,
    whole_number,
)

if TYPE_CHECKING:
    from quantize.formats import Layout, WeightFormat
    from quantize.quantization import Quantize

NAME = METHOD = "awq"
LOADED_WITH = ("gptqmodel",)
LOADED_WITH = ("gptqmodel",)
SCALE = "scales"
SCALE_DTYPES = HALVES
SHAPED = ("qweight", "scales")
SPLIT = ("qweight", "scales", "qzeros")
TRANSPOSED = True
SCHEMES = ("W4A16_ASYM", "W4A16")

BITS = 4
PER_WORD = 8
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Output, counted from the word's first, that each nibble of a word belongs to."""
PLACE = np.argsort(ORDER)
"""Nibble of each output."""


def cannot_hold(quantize: Quantize) -> str | None:
    """Four bits, one scheme, groups in order, linears of the layers alone."""
    if quantize.effective_scheme not in SCHEMES:
        return f"scheme {quantize.effective_scheme}: it has integer weights of 4 bits alone"
    if quantize.overrides:
        return "overrides: it has one number format for all linears"
    if quantize.kv_cache is not None:
        return "kv_cache: its config has no word for scales of keys and values"
    if stores_group_index(quantize):
        return "activation_order: weight of GPTQModel: its groups are runs of neighbouring inputs"
    return None


def cannot_store(form: WeightFormat, shape: tuple[int, ...]) -> str | None:
    """Eight outputs share a word."""
    if shape[0] % PER_WORD:
        return f"{shape[0]} outputs are no multiple of {PER_WORD}, which share a word"
    return None


def cannot_name(quantized: Sequence[str], kept: Sequence[str]) -> str | None:
    """Readers look for the kept names inside the others; none of them expects a quantized head."""
    if "lm_head" in quantized:
        return "a quantized lm_head, which its readers do not look for"
    for entry in _listed(kept):
        inside = next((name for name in quantized if entry in name), None)
        if inside is not None:
            return (
                f"{entry} left out while {inside} is quantized: its readers skip every module "
                "whose name contains that of a module that is left out"
            )
    return None


def layout(form: WeightFormat, shape: tuple[int, ...], scale_dtype: str) -> Layout:
    """See the protocol."""
    rows, columns = shape
    groups = form.scale_shape(shape)[1]
    return {
        "qweight": ("I32", (columns, -(-rows // PER_WORD))),
        "qzeros": ("I32", (groups, -(-rows // PER_WORD))),
        "scales": (scale_dtype, (groups, rows)),
    }


def facts(block: Mapping[str, Any], module: str) -> Facts:
    """See the protocol. Whether the grid is symmetric is in its zero points alone."""
    version = str(block.get("version") or block.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"AWQ version {version!r}, not gemm")
    if whole_number(block, "bits", "w_bit") != BITS:
        raise ValueError(f"AWQ with {whole_number(block, 'bits', 'w_bit')} bits, not {BITS}")
    size = whole_number(block, "group_size", "q_group_size")
    return Facts(BITS, size if size > 0 else None, symmetric=False)


def shape(facts: Facts, arrays: Arrays) -> tuple[int, int]:
    """See the protocol."""
    return int(arrays["scales"].shape[1]), int(arrays["qweight"].shape[0])


def read(facts: Facts, shape: tuple[int, int], arrays: Arrays, block: Mapping[str, Any]) -> Grid:
    """See the protocol."""
    packed = arrays["qweight"]

    def codes(rows: npt.NDArray[np.int64], columns: slice) -> npt.NDArray[np.uint8]:
        return _outputs(packed[columns], rows)

    zero = _outputs(arrays["qzeros"], np.arange(shape[0]))
    return Grid(BITS, shape, codes, np.ascontiguousarray(arrays["scales"].T), zero)


def _outputs(words: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Codes (rows, n) of some outputs, from words (n, out / 8)."""
    fields = words[:, rows // PER_WORD].astype(np.uint32)
    shifts = (BITS * PLACE[rows % PER_WORD]).astype(np.uint32)
    return np.ascontiguousarray(((fields >> shifts) & np.uint32(15)).astype(np.uint8).T)


def _packed(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Codes (n, out) as words (n, out / 8)."""
    placed = codes.reshape(len(codes), -1, PER_WORD)[:, :, ORDER]
    return to_words(placed.reshape(len(codes), -1), BITS)


def write(grid: Grid, symmetric: bool) -> dict[str, Iterator[npt.NDArray[Any]]]:
    """See the protocol. A symmetric grid has zero points of 8."""
    if grid.group is not None:
        raise ValueError("activation order: its groups are runs of neighbouring inputs")
    if grid.bits != BITS:
        raise ValueError(f"{grid.bits} bits: it has integer weights of 4 bits alone")
    rows = np.arange(grid.shape[0])
    return {
        "qweight": (_packed(grid.codes(rows, at).T) for at in column_blocks(grid.shape, 1)),
        "qzeros": pieces(_packed(grid.zeros.T)),
        "scales": pieces(np.ascontiguousarray(grid.scale.T)),
    }


def config(quantized: Mapping[str, Facts], kept: Sequence[str]) -> dict[str, Any]:
    """As AutoAWQ writes it. `zero_point` is true for symmetric grids, too: theirs are stored."""
    if len({(one.bits, one.group_size) for one in quantized.values()}) > 1:
        raise ValueError("several number formats: it has one for all linears")
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": common(quantized).group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _listed(kept) or None,
    }


def config_faults(
    block: Mapping[str, Any], quantized: Mapping[str, Facts], kept: Sequence[str]
) -> list[str]:
    """See the protocol. `lm_head` need not be listed: every reader leaves it alone."""
    sizes = {one.group_size or -1 for one in quantized.values()}
    promised = {"quant_method": METHOD, "bits": BITS, "zero_point": True, "version": "gemm"}
    faults = differences(promised, {**block, "version": str(block.get("version")).lower()})
    if sizes and sizes != {block.get("group_size")}:
        faults.append(f"group_size is {block.get('group_size')!r}, not {sorted(sizes)}")
    listed = block.get("modules_to_not_convert") or []
    for module in _listed(kept):
        if not any(entry in module for entry in listed):
            faults.append(f"modules_to_not_convert lacks {module}, which is not quantized")
    for module in quantized:
        hidden = [entry for entry in listed if entry in module]
        if hidden:
            faults.append(f"modules_to_not_convert has {hidden[0]}, but {module} is quantized")
    return faults


def _listed(kept: Sequence[str]) -> list[str]:
    return [name for name in kept if name != "lm_head"]
