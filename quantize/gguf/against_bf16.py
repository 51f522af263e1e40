"""The audit of a quantized file against the BF16 file that it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from quantize.artifact_checks import Check, cosine, sampled_rows
from quantize.gguf.file import Gguf, GgufTensor
from quantize.gguf.types import GGUF_TYPES, allowed_formats
from quantize.gguf.values import CHUNK_BYTES, Report, block_scales, dequantized, is_quantized

LEAST_COSINE: Mapping[str, float] = {
    "Q2_K": 0.90,
    "Q3_K": 0.96,
    "Q4_0": 0.98,
    "Q4_1": 0.98,
    "Q4_K": 0.98,
    "IQ4_NL": 0.98,
    "IQ4_XS": 0.98,
    "Q5_0": 0.995,
    "Q5_1": 0.995,
    "Q5_K": 0.995,
    "Q6_K": 0.995,
    "Q8_0": 0.9995,
    "F16": 0.9999,
}
"""Of dequantized rows with the BF16 rows: below what the shipped checkpoint's tensors have, without
and with an importance matrix, which gives up some of it for weights that matter (docs/gguf.md).
Another tensor's rows give about 0."""

WEIGHTS = (
    *("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_qkv.weight", "attn_output.weight"),
    *("ffn_up.weight", "ffn_gate.weight", "ffn_down.weight"),
    *("ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"),
)
"""Ends of the names of what must be quantized; of the rest llama.cpp leaves some as it is."""

SHOWN = 3


def check_quantized(converted: Gguf, made: Gguf, scheme: str, report: Report) -> list[Check]:
    """The quantized file against the BF16 file: names, formats, scales, fidelity, metadata."""
    return [
        _check_names(converted, made),
        _check_formats(made, scheme),
        _check_finite(made, report),
        _check_fidelity(converted, made),
        _check_metadata(converted, made, scheme),
    ]


def _check_names(converted: Gguf, made: Gguf) -> Check:
    """Same tensors, same shapes."""
    faults = []
    for name in sorted({*converted.tensors, *made.tensors}):
        theirs, ours = converted.tensors.get(name), made.tensors.get(name)
        if theirs is None or ours is None:
            faults.append(f"{name} is {'not expected' if theirs is None else 'missing'}")
        elif theirs.shape != ours.shape:
            faults.append(f"{name} has shape {ours.shape}, the BF16 file {theirs.shape}")
    detail = _shown(faults) or f"{len(made.tensors)} tensors"
    return Check("every tensor is accounted for", not faults, detail)


def _check_formats(made: Gguf, scheme: str) -> Check:
    """Number formats as the type's mixture has them; fallbacks are said."""
    allowed, main = allowed_formats(scheme), GGUF_TYPES[scheme].main
    counts: Counter[str] = Counter()
    faults = []
    for name, tensor in made.tensors.items():
        counts[tensor.type.name] += 1
        if is_quantized(tensor) and tensor.type.name not in allowed:
            faults.append(f"{name} is {tensor.type.name}")
        elif name.endswith(WEIGHTS) and not is_quantized(tensor) and tensor.type.name != "F16":
            faults.append(f"{name} is not quantized ({tensor.type.name})")
    fallen = fallbacks(made, scheme)
    if main not in counts and not fallen:
        faults.append(f"no tensor is {main}")
    detail = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    if fallen:
        detail += (
            f"; {len(fallen)} of them in other formats than the type's, because blocks of 256 do "
            f"not divide their rows ({fallen[0]})"
        )
    return Check(f"number formats of {scheme}", not faults, _shown(faults) or detail)


def fallbacks(made: Gguf, scheme: str) -> list[str]:
    """Names of quantized tensors whose rows no block of the type's main format divides."""
    found = GGUF_TYPES[scheme]
    if found.main in ("Q4_0", "IQ4_NL", "Q8_0"):
        return []
    return [
        name
        for name, tensor in made.tensors.items()
        if name.endswith(WEIGHTS) and tensor.shape[-1] % 256
    ]


def _check_finite(made: Gguf, report: Report) -> Check:
    """No NaN and no infinity in any scale or any unquantized value."""
    faults = []
    for name, tensor in made.tensors.items():
        bad = 0
        rows = tensor.load()
        step = max(1, CHUNK_BYTES // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            chunk = np.ascontiguousarray(rows[start : start + step])
            values = (
                block_scales(chunk, tensor.type)
                if is_quantized(tensor)
                else dequantized(chunk, tensor.type)
                if tensor.type.name in ("F32", "F16", "BF16")
                else np.zeros(1, np.float32)
            )
            bad += int(np.count_nonzero(~np.isfinite(values)))
        report(tensor.bytes)
        if bad:
            faults.append(f"{name} has {bad} NaN or Inf")
    detail = _shown(faults) or "every scale and every unquantized value is finite"
    return Check("no NaN or Inf", not faults, detail)


def _check_fidelity(converted: Gguf, made: Gguf) -> Check:
    """Dequantized rows point where the BF16 rows do; unquantized tensors are the same bytes."""
    faults: list[str] = []
    lowest: dict[str, float] = {}
    for name, ours in made.tensors.items():
        theirs = converted.tensors.get(name)
        if theirs is None or theirs.shape != ours.shape:
            continue
        if theirs.type == ours.type:
            if not np.array_equal(theirs.load(), ours.load()):
                faults.append(f"{name} differs from the BF16 file")
            continue
        found = _row_cosine(theirs, ours)
        kind = ours.type.name
        lowest[kind] = min(lowest.get(kind, 1.0), found)
        if not found >= LEAST_COSINE.get(kind, 0.98):
            faults.append(f"{name} ({kind}): cosine {found:.3f}")
    figures = [
        f"{kind} {least:.4f} (at least {LEAST_COSINE.get(kind, 0.98)})"
        for kind, least in sorted(lowest.items())
    ]
    fine = f"lowest cosine with BF16 on sampled rows: {', '.join(figures)}"
    return Check("quantized weights are the BF16 file's", not faults, _shown(faults) or fine)


def _row_cosine(theirs: GgufTensor, ours: GgufTensor) -> float:
    rows = sampled_rows(len(ours.load()))
    pair = [
        dequantized(np.ascontiguousarray(one.load()[rows]), one.type).reshape(len(rows), -1)
        for one in (theirs, ours)
    ]
    with np.errstate(invalid="ignore"):  # NaN makes the comparison fail, as it should
        return cosine(pair[0], pair[1])


def _check_metadata(converted: Gguf, made: Gguf, scheme: str) -> Check:
    """Tokenizer and shape of the model are the BF16 file's; the type is the recipe's."""
    theirs, ours = converted.metadata, made.metadata
    own = ("general.file_type", "general.quantization_version")
    faults = [
        f"{key} differs"
        for key in sorted(theirs)
        if key not in own and theirs[key] != ours.get(key)
    ]
    faults += [
        f"{key} is not expected"
        for key in sorted(set(ours) - set(theirs))
        if key not in own and not key.startswith("quantize.imatrix.")
    ]
    faults += [
        f"{key} names a place of this machine"
        for key, value in ours.items()
        if key.startswith("quantize.imatrix.") and isinstance(value, str) and "/" in value
    ]
    expected = GGUF_TYPES[scheme].number
    if ours.get("general.file_type") != expected:
        faults.append(f"general.file_type is {ours.get('general.file_type')}, not {expected}")
    detail = _shown(faults) or f"{len(theirs)} entries as in the BF16 file"
    return Check("metadata", not faults, detail)


def _shown(faults: list[str]) -> str:
    more = f"; and {len(faults) - SHOWN} more" if faults[SHOWN:] else ""
    return "; ".join(faults[:SHOWN]) + more
