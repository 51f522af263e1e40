"""Does a quantized checkpoint hold what its source and its scheme promise? Tensors, one by one.

Everything is read through memory maps, a chunk at a time; memory does not grow with the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantize.checkpoint import LAYER, Checkpoint
from quantize.formats import FLOAT_SCALES, ModuleFormats, WeightFormat, layout_bytes
from quantize.modules import module_name
from quantize.stored import Stored
from quantize.tensors import FLOATS, TensorInfo, chunks, from_float32, load_tensor, to_float32

SIZE_TOLERANCE = 0.01
"""Largest relative difference between the promised and the actual bytes of all tensors."""

LEAST_COSINE = {4: 0.8, 8: 0.95}
"""By bits: lowest cosine between a source weight and its dequantized one on sampled rows.

Round-to-nearest on Gaussian weights gives .994 and .99997, GPTQ somewhat less because it moves
weights to make up for others; a weight of another module, or one unpacked wrongly, gives about 0.
"""

GAIN = (0.7, 1.4)
"""Between these a dequantized row is as long as the source's: a cosine sees no wrong scale."""

ATTENTION = re.compile(r"^(.*)\.(k_proj|kv_b_proj|qkv_proj|query_key_value|c_attn)\.weight$")
"""The linear that makes keys, by which a module that has a KV cache is known."""

SAMPLED_BLOCKS = 8
"""Blocks of eight neighbouring rows, spread evenly, that are dequantized of each weight."""


@dataclass(frozen=True)
class Check:
    """One promise and whether it is kept; `detail` says what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Quantized:
    """A linear of the source and what the artifact has for it."""

    info: TensorInfo  # the source's weight
    form: WeightFormat
    tensors: dict[str, TensorInfo]  # by suffix: weight_packed, ...


@dataclass
class Coverage:
    """Which tensor of the artifact stands for which of the source."""

    kept: dict[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)  # source, ours
    quantized: dict[str, Quantized] = field(default_factory=dict)  # by module
    kv_scales: list[TensorInfo] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    kept_modules: list[str] = field(default_factory=list)  # linears that stay unquantized
    expected_bytes: int = 0  # of all tensors, as the scheme promises from the source's shapes
    left: dict[str, TensorInfo] = field(default_factory=dict)  # of the artifact, not accounted for


def cover(
    source: Checkpoint,
    artifact: Checkpoint,
    formats: ModuleFormats,
    stored: Stored,
    *,
    kv_cache: bool,
) -> Coverage:
    """Account for every tensor of both sides; what does not add up is in `faults`."""
    coverage = Coverage(left=dict(artifact.tensors))
    left = coverage.left
    linears = {info.name for info in source.linears()}
    for name, info in source.tensors.items():
        module = module_name(name)
        form = formats.of(module) if name in linears else None
        if form is not None:
            _cover_quantized(coverage, module, info, form, stored)
        elif name in left:
            ours = left.pop(name)
            coverage.kept[name] = (info, ours)
            coverage.expected_bytes += ours.bytes
            if name in linears:
                coverage.kept_modules.append(module)
            if ours.shape != info.shape:
                coverage.faults.append(f"{name} has shape {ours.shape}, the source {info.shape}")
        elif not (name == "lm_head.weight" and source.tied_embeddings):
            coverage.faults.append(f"{name} of the source is missing")
    if "lm_head.weight" in left and source.tied_embeddings:  # a copy of the embedding, written out
        embedding = next((i for n, i in source.tensors.items() if "embed_tokens" in n), None)
        if embedding is not None:
            coverage.kept["lm_head.weight"] = (embedding, left.pop("lm_head.weight"))
            coverage.expected_bytes += embedding.bytes
    if kv_cache:
        _cover_kv_scales(coverage, source, left)
    coverage.faults += [f"{name} is not expected" for name in sorted(left)]
    return coverage


def _cover_quantized(
    coverage: Coverage,
    module: str,
    info: TensorInfo,
    form: WeightFormat,
    stored: Stored,
) -> None:
    scale_dtype = "BF16" if info.dtype == "F32" else info.dtype
    layout = stored.layout(form, info.shape, scale_dtype)
    coverage.expected_bytes += layout_bytes(layout)
    found: dict[str, TensorInfo] = {}
    for suffix, (dtype, shape) in layout.items():
        ours = coverage.left.pop(f"{module}.{suffix}", None)
        if ours is None:
            coverage.faults.append(f"{module}.{suffix} is missing: the module is not quantized")
            continue
        found[suffix] = ours
        dtypes = FLOAT_SCALES if dtype == scale_dtype else (dtype,)
        if ours.dtype not in dtypes or ours.shape != shape:
            coverage.faults.append(
                f"{ours.name} is {ours.dtype} {list(ours.shape)}, "
                f"{form.scheme} promises {dtype} {list(shape)}"
            )
    if found.keys() == layout.keys():
        coverage.quantized[module] = Quantized(info, form, found)


def _cover_kv_scales(coverage: Coverage, source: Checkpoint, left: dict[str, TensorInfo]) -> None:
    """One scale for all keys and one for all values of each attention module."""
    attentions = [found[1] for name in source.tensors if (found := ATTENTION.match(name))]
    for name in [f"{module}.{part}" for module in attentions for part in ("k_scale", "v_scale")]:
        ours = left.pop(name, None)
        if ours is None:
            coverage.faults.append(f"{name} is missing: the KV cache has no scale")
            continue
        coverage.kv_scales.append(ours)
        coverage.expected_bytes += ours.bytes
        if ours.dtype not in FLOAT_SCALES or ours.elements != 1:
            coverage.faults.append(f"{name} is {ours.dtype} {list(ours.shape)}, not one float")


def check_tensors(
    source: Checkpoint,
    artifact: Checkpoint,
    formats: ModuleFormats,
    stored: Stored,
    *,
    kv_cache: bool,
    rescales: bool,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[list[Check], Coverage]:
    """Every check on tensors. Values are looked at only where names and shapes add up.

    `kv_cache`: the recipe asks for scales of keys and values.
    `rescales`: the method moves scales between layers (AWQ), so that norms and kept weights inside
    layers may differ from the source by positive factors. `report` is told of bytes done.
    """
    coverage = cover(source, artifact, formats, stored, kv_cache=kv_cache)
    checks = [
        _check(
            "every tensor accounted for", coverage.faults, f"{len(source.tensors)} of the source"
        ),
        Check(
            "something is quantized", bool(coverage.quantized), f"{len(coverage.quantized)} modules"
        ),
    ]
    checks.append(_finite(artifact, report))
    if not coverage.faults:
        checks += [
            _scales(coverage, stored),
            _kept(coverage, rescales),
            _fidelity(coverage, stored, rescales, report),
            _size(artifact, coverage),
        ]
    return checks, coverage


def _check(name: str, faults: Sequence[str], fine: str) -> Check:
    if not faults:
        return Check(name, True, fine)
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return Check(name, False, "; ".join(faults[:5]) + more)


def _finite(artifact: Checkpoint, report: Callable[[int], None]) -> Check:
    faults = []
    for info in artifact.tensors.values():
        if info.dtype in FLOATS:
            bad = 0
            for chunk in chunks(info):
                bad += not_finite(chunk, info.dtype)
                report(chunk.nbytes)
            if bad:
                faults.append(f"{info.name} has {bad} NaN or Inf of {info.elements}")
        else:
            report(info.bytes)
    return _check("no NaN or Inf", faults, "every float tensor is finite")


def not_finite(values: npt.NDArray[np.generic], dtype: str) -> int:
    """How many elements are NaN or infinite, from the bits of :func:`load_tensor`'s form."""
    match dtype:
        case "BF16":
            bad = (values & np.uint16(0x7F80)) == 0x7F80  # type: ignore[operator]
        case "F8_E4M3":  # has no infinity
            bad = (values & np.uint8(0x7F)) == 0x7F  # type: ignore[operator]
        case "F8_E5M2":
            bad = (values & np.uint8(0x7C)) == 0x7C  # type: ignore[operator]
        case "F8_E8M0":
            bad = values == np.uint8(0xFF)
        case _:
            bad = ~np.isfinite(values)
    return int(np.count_nonzero(bad))


def _scales(coverage: Coverage, stored: Stored) -> Check:
    """Scales are positive; a packed module's `weight_shape` is the source's."""
    faults, count = [], 0
    for info, values in _scale_values(coverage, stored):
        count += values.size
        bad = int(np.count_nonzero(~(values > 0)))
        if bad:
            faults.append(f"{info.name} has {bad} of {values.size} not above 0")
    for module, linear in coverage.quantized.items():
        shape = linear.tensors.get("weight_shape")
        if shape is not None and tuple(load_tensor(shape)) != linear.info.shape:
            faults.append(f"{module}.weight_shape is not {list(linear.info.shape)}")
    return _check("scales are positive", faults, f"{count} scales")


def _scale_values(
    coverage: Coverage, stored: Stored
) -> Iterator[tuple[TensorInfo, npt.NDArray[np.float32]]]:
    for linear in coverage.quantized.values():
        yield from stored.scales(linear.form, linear.tensors)
    for info in coverage.kv_scales:
        yield info, to_float32(load_tensor(info), info.dtype)


def _kept(coverage: Coverage, rescales: bool) -> Check:
    """Unquantized tensors are the source's, bit by bit.

    A tensor in another dtype, as AutoAWQ writes FP16 for BF16, must be the source's rounded once:
    nearest, ties to even. What FP16 cannot hold becomes Inf, which another check finds, or 0.
    """
    faults, rescaled = [], 0
    dtypes: dict[str, int] = {}  # of tensors in another dtype, with how many there are
    for name, (theirs, ours) in coverage.kept.items():
        if theirs.dtype != ours.dtype:
            became = f"{ours.dtype} instead of {theirs.dtype}"
            dtypes[became] = dtypes.get(became, 0) + 1
        same = same_sign = True
        for a, b in zip(chunks(theirs), chunks(ours), strict=True):
            wanted = a
            if theirs.dtype != ours.dtype:
                wanted = from_float32(to_float32(a, theirs.dtype), ours.dtype)
            if np.array_equal(wanted, b):
                continue
            same = False
            if ours.dtype not in FLOATS:
                same_sign = False
                break
            same_sign &= np.array_equal(
                np.sign(to_float32(wanted, ours.dtype)), np.sign(to_float32(b, ours.dtype))
            )
        if not same and rescales and same_sign and LAYER.search(name):
            rescaled += 1
        elif not same:
            faults.append(f"{name} differs from the source")
    fine = f"{len(coverage.kept) - rescaled} tensors"
    if rescaled:
        fine += f"; {rescaled} inside layers differ by positive factors, as the method moves scales"
    for became, count in dtypes.items():
        fine += f"; {count} in {became}, rounded once"
    return _check("unquantized tensors are identical", faults, fine)


def _fidelity(
    coverage: Coverage, stored: Stored, rescales: bool, report: Callable[[int], None]
) -> Check:
    """Dequantized rows point where the source's rows do, and are as long.

    With AWQ (`rescales`) lengths say nothing: it moves factors between layers on purpose.
    """
    faults: list[str] = []
    lowest: dict[int, float] = {}  # by bits
    for module, linear in coverage.quantized.items():
        info, form = linear.info, linear.form
        rows = sampled_rows(info.shape[0])
        theirs = to_float32(np.asarray(load_tensor(info)[rows]), info.dtype)
        ours = stored.dequantized_rows(form, linear.tensors, rows, info.shape)
        if rescales:
            theirs = _rescaled(theirs, ours)
        elif (wrong := _wrong_gain(theirs, ours)) is not None:
            row, gain = wrong
            faults.append(f"{module}: row {rows[row]} is {gain:.2f} times the source's")
        similar = cosine(theirs, ours)
        lowest[form.bits] = min(lowest.get(form.bits, 1.0), similar)
        if not similar >= LEAST_COSINE[form.bits]:
            faults.append(f"{module}: cosine {similar:.3f}")
        report(0)
    figures = [
        f"{least:.4f} at {bits} bits (at least {LEAST_COSINE[bits]})"
        for bits, least in sorted(lowest.items())
    ]
    fine = f"lowest cosine with the source on sampled rows: {', '.join(figures)}"
    return _check("quantized weights are the source's", faults, fine)


def sampled_rows(rows: int) -> npt.NDArray[np.int64]:
    """All rows, or evenly spread blocks of eight."""
    count = rows // 8
    if count <= SAMPLED_BLOCKS:
        return np.arange(rows)
    starts = np.linspace(0, count - 1, SAMPLED_BLOCKS).astype(np.int64) * 8
    return (starts[:, None] + np.arange(8)).reshape(-1)


def _rescaled(
    theirs: npt.NDArray[np.float32], ours: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """`theirs` (rows, columns) with the row and column factors that fit `ours` best.

    AWQ multiplies a linear's columns by what it divides the layer before by; where that layer is a
    linear, its rows. Alternating least squares: a factor is <x, y> / <x, x>.
    """
    for _ in range(3):
        for axis in (0, 1):
            square = np.sum(theirs * theirs, axis=axis, keepdims=True)
            product = np.sum(theirs * ours, axis=axis, keepdims=True)
            theirs = theirs * np.divide(product, square, out=np.ones_like(square), where=square > 0)
    return theirs


def _wrong_gain(
    theirs: npt.NDArray[np.float32], ours: npt.NDArray[np.float32]
) -> tuple[int, float] | None:
    """First row whose factor <x, y> / <x, x> is outside `GAIN`, with it; zero rows have none."""
    square = np.sum(theirs * theirs, axis=1)
    product = np.sum(theirs * ours, axis=1)
    gain = np.divide(product, square, out=np.ones_like(square), where=square > 0)
    wrong = np.flatnonzero(~((gain >= GAIN[0]) & (gain <= GAIN[1])))
    return (int(wrong[0]), float(gain[wrong[0]])) if len(wrong) else None


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """<a, b> / (|a| |b|) over all elements; two zero arrays point the same way."""
    norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if norm == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.sum(a * b, dtype=np.float64)) / norm


def _size(artifact: Checkpoint, coverage: Coverage) -> Check:
    actual, expected = artifact.weight_bytes, coverage.expected_bytes
    return Check(
        "size as the scheme promises",
        abs(actual - expected) <= SIZE_TOLERANCE * expected,
        f"{actual} bytes of tensors, {expected} promised",
    )
