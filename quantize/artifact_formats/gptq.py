"""GPTQ as AutoGPTQ and GPTQModel write it: 4 or 8 bits.

Of a weight (out, in): `qweight` int32 (in * bits / 32, out), 32 / bits neighbouring inputs in a
word, `qzeros` int32 (groups, out * bits / 32), `scales` (groups, out), `g_idx` int32 (in), the
group of each input; the first element is always in the lowest bits (GPTQModel 7.7,
`nn_modules/qlinear/__init__.py`, pack_original).

Version 1 (`checkpoint_format: gptq`) stores zero points less one. Its zero point 0 is ambiguous:
GPTQModel subtracts from whole words, with a borrow, and adds to whole words; kernels of AutoGPTQ's
time add to single fields. So symmetric grids, whose zero points are in the middle, are written as
version 1, which everything reads, and others as version 2 (`gptq_v2`), which stores zero points as
they are; GPTQModel refuses an asymmetric version 1 that it has not written (`models/loader.py`).

vLLM 0.32 (`auto_gptq.py`, `gptq_utils.py`) takes symmetric grids of 4 or 8 bits, ignores `g_idx`,
and refuses `desc_act`. `dynamic` maps regular expressions, matched from a name's start, to other
values; those with `-:` in front are not quantized. Joined linears are looked up by the name of the
joint.
"""

from __future__ import annotations

import re
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
    mapping,
    names_it,
    pieces,
    to_codes,
    to_words,
    whole_number,
)
from quantize.modules import served_unit

if TYPE_CHECKING:
    from quantize.formats import Layout, WeightFormat
    from quantize.quantization import Quantize

NAME = METHOD = "gptq"
LOADED_WITH = ("optimum", "gptqmodel")
LOADED_WITH = ("optimum", "gptqmodel")
SCALE = "scales"
SCALE_DTYPES = HALVES
SHAPED = ("qweight", "scales")
SPLIT = ("qweight", "scales", "qzeros")
TRANSPOSED = True
SCHEMES = ("W4A16", "W8A16", "W4A16_ASYM")
ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
"""One in every field of a word."""
VERSION_1, VERSION_2 = "gptq", "gptq_v2"
WRITER_WITH_BORROW = "gptqmodel"


def cannot_hold(quantize: Quantize) -> str | None:
    """Integer weights of 4 or 8 bits, which may differ in bits and group size."""
    schemes = [quantize.effective_scheme, *(one.scheme for one in quantize.overrides)]
    odd = [scheme for scheme in schemes if scheme not in SCHEMES]
    if odd:
        return f"scheme {odd[0]}: it has integer weights of 4 or 8 bits, in 16-bit models, alone"
    if len({scheme.endswith("_ASYM") for scheme in schemes}) > 1:
        return "overrides that mix symmetric and asymmetric grids: it stores all zero points alike"
    if quantize.kv_cache is not None:
        return "kv_cache: its config has no word for scales of keys and values"
    return None


def cannot_store(form: WeightFormat, shape: tuple[int, ...]) -> str | None:
    """Neighbouring inputs share a word, and outputs do, in the zero points."""
    per_word = 32 // form.bits
    for count, what in zip(shape, ("outputs", "inputs"), strict=True):
        if count % per_word:
            return f"{count} {what} are no multiple of {per_word}, which share a word"
    return None


def cannot_name(quantized: Sequence[str], kept: Sequence[str]) -> str | None:
    """Anything: `dynamic` has a pattern for each."""
    return None


def layout(form: WeightFormat, shape: tuple[int, ...], scale_dtype: str) -> Layout:
    """See the protocol."""
    rows, columns = shape
    groups = form.scale_shape(shape)[1]
    per_word = 32 // form.bits
    return {
        "qweight": ("I32", (-(-columns // per_word), rows)),
        "qzeros": ("I32", (groups, -(-rows // per_word))),
        "scales": (scale_dtype, (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def facts(block: Mapping[str, Any], module: str) -> Facts:
    """See the protocol."""
    version = _version(block)
    if version not in (VERSION_1, VERSION_2):
        raise ValueError(f"GPTQ checkpoint_format {version!r}, not {VERSION_1} or {VERSION_2}")
    own = {**block, **_dynamic(block, module)}
    bits, size = whole_number(own, "bits"), whole_number(own, "group_size")
    if bits not in ONES:
        raise ValueError(f"GPTQ with {bits} bits, not 4 or 8")
    return Facts(bits, size if size > 0 else None, bool(own.get("sym", True)))


def _version(block: Mapping[str, Any]) -> str:
    return str(block.get("checkpoint_format") or block.get("format") or VERSION_1)


def _dynamic(block: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Values of the first pattern that names a module."""
    for pattern, values in mapping(block.get("dynamic"), "dynamic").items():
        if not pattern.startswith("-:") and names_it(pattern.removeprefix("+:"), module):
            return mapping(values, f"dynamic.{pattern}")
    return {}


def shape(facts: Facts, arrays: Arrays) -> tuple[int, int]:
    """See the protocol."""
    return int(arrays["scales"].shape[1]), int(arrays["qweight"].shape[0]) * 32 // facts.bits


def read(facts: Facts, shape: tuple[int, int], arrays: Arrays, block: Mapping[str, Any]) -> Grid:
    """See the protocol."""
    bits, packed = facts.bits, arrays["qweight"]
    per_word = 32 // bits

    def codes(rows: npt.NDArray[np.int64], columns: slice) -> npt.NDArray[np.uint8]:
        first = columns.start // per_word
        words = packed[first : -(-columns.stop // per_word)][:, rows]
        found = to_codes(np.ascontiguousarray(words.T), bits)
        return found[:, columns.start - first * per_word : columns.stop - first * per_word]

    zero = _zero_points(np.asarray(arrays["qzeros"]), bits, block)[:, : shape[0]]
    groups = len(arrays["scales"])
    return Grid(
        bits,
        shape,
        codes,
        np.ascontiguousarray(arrays["scales"].T),
        np.ascontiguousarray(zero.T),
        _groups(arrays, shape[1], groups),
    )


def _zero_points(
    words: npt.NDArray[Any], bits: int, block: Mapping[str, Any]
) -> npt.NDArray[np.uint8]:
    """Zero points (groups, out) of words; in version 1 one is added back to each."""
    if _version(block) == VERSION_2:
        return to_codes(words, bits)
    borrowed = WRITER_WITH_BORROW in str(mapping(block.get("meta"), "meta").get("quantizer"))
    if not borrowed and np.any(to_codes(words, bits) == (1 << bits) - 1):
        raise ValueError(
            f"zero points of {(1 << bits) - 1} less one, which some readers take for 0 and others "
            f"for {1 << bits}: GPTQ's version 1 cannot say which"
        )
    more = (np.ascontiguousarray(words).view(np.uint32) + ONES[bits]).view(np.int32)
    return to_codes(more, bits)


def _groups(arrays: Arrays, columns: int, groups: int) -> npt.NDArray[np.int64] | None:
    """The group of each input; None where they are in order, or not stored."""
    if columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} inputs")
    if "g_idx" not in arrays:
        return None
    found = np.asarray(arrays["g_idx"]).astype(np.int64)
    if found.shape != (columns,) or found.min(initial=0) < 0 or found.max(initial=0) >= groups:
        raise ValueError(f"g_idx does not name one of {groups} groups for each of {columns} inputs")
    return None if np.array_equal(found, np.arange(columns) // (columns // groups)) else found


def write(grid: Grid, symmetric: bool) -> dict[str, Iterator[npt.NDArray[Any]]]:
    """See the protocol. Symmetric grids as version 1, others as version 2."""
    if symmetric and not grid.centred:
        raise ValueError("zero points that are not in the middle of a symmetric grid")
    bits, rows = grid.bits, np.arange(grid.shape[0])
    zero = grid.zeros.T - np.uint8(symmetric)
    blocks = column_blocks(grid.shape, 32 // bits)
    return {
        "qweight": (_packed(grid.codes(rows, at), bits) for at in blocks),
        "qzeros": pieces(to_words(np.ascontiguousarray(zero), bits)),
        "scales": pieces(np.ascontiguousarray(grid.scale.T)),
        "g_idx": pieces(grid.groups.astype("<i4")),
    }


def _packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Codes (out, n) as words (n * bits / 32, out)."""
    return np.ascontiguousarray(to_words(codes, bits).T)


def config(quantized: Mapping[str, Facts], kept: Sequence[str]) -> dict[str, Any]:
    """As GPTQModel writes it; who quantized is not said, for nobody who reads it did."""
    most = common(quantized)
    if len({one.symmetric for one in quantized.values()}) > 1:
        raise ValueError("symmetric and asymmetric grids: it stores all zero points alike")
    dynamic: dict[str, dict[str, Any]] = {
        f"-:{_pattern(module)}": {} for module in kept if module != "lm_head"
    }
    for module, one in quantized.items():
        if one != most:
            dynamic[f"+:{_pattern(module)}"] = _values(one)
    return {
        "quant_method": METHOD,
        **_values(most),
        "desc_act": False,
        "lm_head": "lm_head" in quantized,
        "checkpoint_format": VERSION_1 if most.symmetric else VERSION_2,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _values(one: Facts) -> dict[str, Any]:
    return {"bits": one.bits, "group_size": one.group_size or -1, "sym": one.symmetric}


def _pattern(module: str) -> str:
    """A module's name and that of what it is served in, from start to end."""
    unit = served_unit(module)
    joint = unit if unit.endswith("experts") else f"{unit}_proj"
    names = [module] if unit == module else [module, joint]
    return f"^({'|'.join(map(re.escape, names))})$"


def config_faults(
    block: Mapping[str, Any], quantized: Mapping[str, Facts], kept: Sequence[str]
) -> list[str]:
    """See the protocol. `lm_head` need not be named where `lm_head` is false."""
    faults = differences({"quant_method": METHOD}, block)
    dynamic = mapping(block.get("dynamic"), "dynamic")
    skip = [key.removeprefix("-:") for key in dynamic if key.startswith("-:")]
    for module, one in quantized.items():
        try:
            stated = facts(block, module)
        except ValueError as error:
            return [*faults, str(error)]
        if stated != one:
            faults.append(f"{module} is said to have {_values(stated)}, not {_values(one)}")
        if any(names_it(pattern, module) for pattern in skip):
            faults.append(f"dynamic leaves out {module}, which is quantized")
    only = block.get("modules_in_block_to_quantize")
    for module in kept:
        named = bool(only) or any(names_it(pattern, module) for pattern in skip)
        if module == "lm_head" and not block.get("lm_head"):
            named = True
        if not named:
            faults.append(f"dynamic lacks {module}, which is not quantized")
    return faults
