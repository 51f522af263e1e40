"""llama.cpp's types: what is in a file of each, how good it is expected to be, how large.

A type such as Q4_K_M is a mixture: most weights in one number format, those that a model is most
sensitive to in larger ones (src/llama-quant.cpp, llama.cpp 0.5.0). Where the rows of a tensor are
no whole number of blocks, it falls back to a format with smaller blocks (`tensor_type_fallback`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """One type; what it costs and is good for, as llama-quantize's own help states it."""

    number: int  # general.file_type (llama_ftype in include/llama.h)
    main: str  # number format of most weights
    others: tuple[str, ...]  # of the sensitive ones
    gibibytes: float | None  # of Llama-3-8B's file, where that is stated
    use: str  # what it is good for


GGUF_TYPES: Mapping[str, GgufType] = {
    "Q2_K": GgufType(10, "Q2_K", ("Q3_K", "Q4_K", "Q5_K", "Q6_K"), 2.96, "last resort: large loss"),
    "Q3_K_M": GgufType(12, "Q3_K", ("Q4_K", "Q5_K", "Q6_K"), 3.74, "small memory, clear loss"),
    "Q4_0": GgufType(2, "Q4_0", ("Q4_1", "Q6_K"), 4.34, "old type, fast on some ARM processors"),
    "IQ4_XS": GgufType(
        30,
        "IQ4_XS",
        ("Q5_K", "Q6_K", "Q8_0", "IQ4_NL"),
        None,
        "smaller than Q4_K_S, slower on CPUs",
    ),
    "IQ4_NL": GgufType(
        25, "IQ4_NL", ("Q5_K", "Q6_K", "Q8_0"), None, "as IQ4_XS, for rows that 256 does not divide"
    ),
    "Q4_K_S": GgufType(14, "Q4_K", ("Q5_K", "Q6_K"), 4.37, "a little smaller than Q4_K_M"),
    "Q4_K_M": GgufType(15, "Q4_K", ("Q5_K", "Q6_K"), 4.58, "the usual choice"),
    "Q5_K_S": GgufType(16, "Q5_K", ("Q6_K",), 5.21, "a little smaller than Q5_K_M"),
    "Q5_K_M": GgufType(17, "Q5_K", ("Q6_K",), 5.33, "small loss"),
    "Q6_K": GgufType(18, "Q6_K", ("Q8_0",), 6.14, "very small loss"),
    "Q8_0": GgufType(7, "Q8_0", (), 7.96, "next to none: a stand-in for BF16"),
}

FALLBACK: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What stands for a format of blocks of 256 where they do not divide a tensor's rows; F16 where not
even blocks of 32 do."""

LLAMA_3_8B = 8_030_261_248
"""Its parameters."""

STATED_BITS = {"IQ4_XS": 4.25, "IQ4_NL": 4.5}
"""Bits per weight of the number format alone, where no size of Llama-3-8B is stated."""


def bits_on_llama(scheme: str) -> float:
    """Bits per weight of Llama-3-8B in a type, all tensors counted where that is known."""
    size = GGUF_TYPES[scheme].gibibytes
    return STATED_BITS[scheme] if size is None else size * 2**30 * 8 / LLAMA_3_8B


def estimated_bytes(scheme: str, parameters: int) -> int:
    """Bytes of a file of that many parameters; small models are larger, by their vocabularies."""
    return round(bits_on_llama(scheme) / 8 * parameters)


def allowed_formats(scheme: str) -> frozenset[str]:
    """Number formats that the quantized tensors of a file may have."""
    found = GGUF_TYPES[scheme]
    formats = {found.main, *found.others}
    fallbacks = {FALLBACK[name] for name in formats if name in FALLBACK}
    return frozenset(formats | fallbacks | {"Q8_0", "F16"})
