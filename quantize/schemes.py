"""Names that a recipe may use: methods, engines, formats, schemes, and which goes with which."""

from __future__ import annotations

from typing import Literal, get_args

from quantize.engines import ENGINES, default_engine

Method = Literal["awq", "gptq", "awq+gptq", "rtn", "fp8", "int8", "autoround", "gguf"]
EngineName = Literal[
    "stream",
    "llmcompressor",
    "autoawq",
    "gptqmodel",
    "llamacpp",
    "elsewhere",
    "auto-gptq",
    "autogptq",
]
"""The last two are old names of gptqmodel."""
Format = Literal["compressed-tensors", "awq", "gptq", "gguf"]
Scheme = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "Q2_K",
    "Q3_K_M",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "IQ4_XS",
    "IQ4_NL",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
]

DEFAULT_SCHEME: dict[str, str] = {
    "awq": "W4A16_ASYM",
    "gptq": "W4A16",
    "awq+gptq": "W4A16_ASYM",
    "rtn": "W4A16",
    "fp8": "FP8_DYNAMIC",
    "int8": "W8A8",
    "autoround": "W4A16",
    "gguf": "Q4_K_M",
}
SCHEMES: dict[str, tuple[str, ...]] = {
    method: schemes
    for engine in reversed(ENGINES.values())  # the first engine that has a method says the most
    for method, schemes in engine.METHODS.items()
}
"""Which schemes a method can produce, best first, whatever the engine."""

MADE_HERE = tuple(m for m in get_args(Method) if default_engine(m) != "elsewhere")
"""Methods that an engine here has; others are those of artifacts that were quantized elsewhere."""

GROUPED = frozenset({"W4A16", "W4A16_ASYM", "W8A16"})
"""Schemes whose scales are per group of input channels, of a size that the recipe may choose."""

FOUR_BITS = ("W4", "Q2", "Q3", "Q4", "Q5", "IQ4")
"""What the names of schemes of about four bits begin with; Q5 loses more than 8 bits do, too."""

DEFAULT_GROUP_SIZE = 128

FIXED_GROUPS = {"NVFP4A16": 16, "MXFP4A16": 32}
"""Schemes whose groups of input channels have the size that the number format prescribes."""

IMATRIX = frozenset(
    {"Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL", "Q5_K_S", "Q5_K_M", "Q6_K", "Q4_0"}
)
"""GGUF types that read an importance matrix where there is one; they can do without."""

DATA_FREE = (
    frozenset({("rtn", s) for s in SCHEMES["rtn"]})
    | {("gguf", s) for s in SCHEMES["gguf"]}
    | {("fp8", "FP8_DYNAMIC"), ("fp8", "FP8_BLOCK")}
)
"""(method, scheme) pairs that need no calibration data."""
