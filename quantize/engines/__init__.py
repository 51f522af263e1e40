"""Who quantizes: one file per engine, in the literal table `ENGINES`. Standard library alone."""

from __future__ import annotations

from typing import cast

from quantize.engines import (
    autoawq,
    elsewhere,
    gptqmodel,
    llamacpp,
    llmcompressor,
    stream,
)
from quantize.engines.base import Engine

ENGINES: dict[str, Engine] = {
    "stream": cast(Engine, stream),
    "llmcompressor": cast(Engine, llmcompressor),
    "autoawq": cast(Engine, autoawq),
    "gptqmodel": cast(Engine, gptqmodel),
    "llamacpp": cast(Engine, llamacpp),
    "elsewhere": cast(Engine, elsewhere),
}

OLD_NAMES = {"auto-gptq": "gptqmodel", "autogptq": "gptqmodel"}
"""Names that recipes still have: AutoGPTQ is no longer maintained, GPTQModel goes on from it."""


def default_engine(method: str) -> str:
    """The first engine of the table that has the method."""
    return next((name for name, engine in ENGINES.items() if method in engine.METHODS), "stream")
