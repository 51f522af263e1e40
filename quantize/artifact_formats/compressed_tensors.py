"""compressed-tensors 0.19, what llm-compressor and our own engine write.

Its layouts are in :mod:`quantize.formats`, for it holds every scheme. Here is its `pack-quantized`,
as far as the other formats can express it: `weight_packed` int32 (out, in * bits / 32),
neighbouring inputs in a word; `weight_scale` (out, groups); `weight_zero_point` int32
(out * bits / 32, groups), neighbouring outputs in a word, absent for symmetric grids;
`weight_shape` (2). All numbers carry an offset of 2**(bits - 1), which makes them codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantize.artifact_formats.base import (
    BLOCK_ELEMENTS,
    HALVES,
    Arrays,
    Facts,
    Grid,
    mapping,
    names_it,
    pieces,
    stores_group_index,
    to_codes,
    to_words,
    whole_number,
)
from quantize.modules import matches

if TYPE_CHECKING:
    from quantize.formats import Layout, WeightFormat
    from quantize.quantization import Quantize

NAME = METHOD = "compressed-tensors"
LOADED_WITH = ("compressed-tensors",)
LOADED_WITH = ("compressed-tensors",)
SCALE = "weight_scale"
SCALE_DTYPES = (*HALVES, "F32")
SHAPED = ("weight_packed", "weight_shape")
SPLIT = ("weight_packed", "weight_scale", "weight_zero_point")
TRANSPOSED = False
PACKED = "pack-quantized"


def cannot_hold(quantize: Quantize) -> str | None:
    """All that our engines make."""
    if stores_group_index(quantize):
        return "activation_order: weight of GPTQModel: it is no longer read there"
    return None


def cannot_store(form: WeightFormat, shape: tuple[int, ...]) -> str | None:
    """Any shape: the last word is filled up."""
    return None


def cannot_name(quantized: Sequence[str], kept: Sequence[str]) -> str | None:
    """Anything: `ignore` has names."""
    return None


def layout(form: WeightFormat, shape: tuple[int, ...], scale_dtype: str) -> Layout:
    """See the protocol."""
    return form.layout(shape, scale_dtype)


def groups_of(module: str, groups: Mapping[str, Any]) -> list[str]:
    """The groups that readers take for a linear, each once: none, one, or two if they disagree.

    Of those whose targets name it, vLLM takes the first (`compressed_tensors/utils.py`,
    _find_first_match). compressed-tensors takes names before patterns, and patterns in the order
    of the alphabet (`utils/match.py`, match_targets). Where none names it, the one for all linears.
    """
    targets = [(t, key) for key, group in groups.items() for t in group.get("targets") or ()]
    named = [(t, key) for t, key in targets if matches(module, [t])]
    if not named:
        return [key for t, key in targets if t == "Linear"][:1]
    by_compressed_tensors = min(named, key=lambda pair: ("re:" in pair[0], pair[0]))
    return list(dict.fromkeys([named[0][1], by_compressed_tensors[1]]))


def facts(block: Mapping[str, Any], module: str) -> Facts:
    """See the protocol."""
    groups = {
        key: mapping(group, f"config_groups.{key}")
        for key, group in mapping(block.get("config_groups"), "config_groups").items()
    }
    targets = [target for group in groups.values() for target in group.get("targets") or ()]
    if not all(isinstance(target, str) for target in targets):
        raise ValueError("targets of quantization_config are no names")
    for target in targets:
        names_it(target.removeprefix("re:") if target.startswith("re:") else "", module)
    found = groups_of(module, groups)
    if len(found) != 1:
        raise ValueError(f"{len(found)} config groups for {module}, not one")
    group = groups[found[0]]
    if (group.get("format") or block.get("format")) != PACKED:
        raise ValueError(f"format {group.get('format') or block.get('format')}, not {PACKED}")
    weights = mapping(group.get("weights"), "weights")
    bits = whole_number(weights, "num_bits")
    if bits not in (4, 8) or weights.get("type") != "int":
        raise ValueError(f"{weights.get('type')} of {bits} bits, not integers of 4 or 8")
    if weights.get("strategy") not in ("group", "channel"):
        raise ValueError(f"scales for each {weights.get('strategy')}, not group or channel")
    if weights.get("actorder") in ("group", "dynamic"):
        raise ValueError("groups in the order of activations")
    size = whole_number(weights, "group_size") if weights["strategy"] == "group" else None
    return Facts(bits, size, bool(weights.get("symmetric", True)))


def shape(facts: Facts, arrays: Arrays) -> tuple[int, int]:
    """See the protocol."""
    stated = tuple(int(extent) for extent in np.asarray(arrays["weight_shape"]).reshape(-1))
    rows, words = arrays["weight_packed"].shape
    if len(stated) != 2 or stated[0] != rows or -(-stated[1] * facts.bits // 32) != words:
        raise ValueError(f"weight_shape {stated} does not fit weight_packed {[rows, words]}")
    return rows, stated[1]


def read(facts: Facts, shape: tuple[int, int], arrays: Arrays, block: Mapping[str, Any]) -> Grid:
    """See the protocol."""
    bits, packed = facts.bits, arrays["weight_packed"]
    per_word = 32 // bits

    def codes(rows: npt.NDArray[np.int64], columns: slice) -> npt.NDArray[np.uint8]:
        first = columns.start // per_word
        found = to_codes(packed[:, first : -(-columns.stop // per_word)][rows], bits)
        return found[:, columns.start - first * per_word : columns.stop - first * per_word]

    zero = None
    if "weight_zero_point" in arrays:
        words = np.ascontiguousarray(arrays["weight_zero_point"].T)
        zero = np.ascontiguousarray(to_codes(words, bits)[:, : shape[0]].T)
    return Grid(bits, shape, codes, np.asarray(arrays["weight_scale"]), zero)


def write(grid: Grid, symmetric: bool) -> dict[str, Iterator[npt.NDArray[Any]]]:
    """See the protocol."""
    if grid.group is not None:
        raise ValueError("activation order: vLLM no longer reads groups out of order")
    if symmetric and not grid.centred:
        raise ValueError("zero points that are not in the middle of a symmetric grid")
    rows, columns = grid.shape
    parts = {
        "weight_packed": _packed_rows(grid),
        "weight_scale": pieces(np.ascontiguousarray(grid.scale)),
        "weight_shape": pieces(np.array([rows, columns], "<i8")),
    }
    if not symmetric:
        words = to_words(_filled(grid.zeros.T, grid.bits), grid.bits)
        parts["weight_zero_point"] = pieces(np.ascontiguousarray(words.T))
    return parts


def _packed_rows(grid: Grid) -> Iterator[npt.NDArray[np.int32]]:
    rows, columns = grid.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        wanted = np.arange(start, min(start + step, rows))
        yield to_words(_filled(grid.codes(wanted, slice(0, columns)), grid.bits), grid.bits)


def _filled(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Zeros after the last of each row, up to a whole word."""
    missing = -codes.shape[1] % (32 // bits)
    return np.pad(codes, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(codes)


def config(quantized: Mapping[str, Facts], kept: Sequence[str]) -> dict[str, Any]:
    """As compressed-tensors writes it: a group for all linears, one more for each other format."""
    by_facts: dict[Facts, list[str]] = {}
    for module, one in quantized.items():
        by_facts.setdefault(one, []).append(module)
    ordered = sorted(by_facts.items(), key=lambda item: len(item[1]))  # names before the rest
    groups = {
        f"group_{index}": _group(one, ["Linear"] if index == len(ordered) - 1 else modules)
        for index, (one, modules) in enumerate(ordered)
    }
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(one: Facts, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": one.bits,
        "type": "int",
        "symmetric": one.symmetric,
        "strategy": "group" if one.group_size else "channel",
        "group_size": one.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    return {
        "targets": targets,
        "format": PACKED,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def config_faults(
    block: Mapping[str, Any], quantized: Mapping[str, Facts], kept: Sequence[str]
) -> list[str]:
    """Nothing more than what :mod:`quantize.config_checks` asks of every scheme."""
    return []
