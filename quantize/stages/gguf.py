"""The source as a BF16 GGUF file: what llama.cpp quantizes, and what it is measured against.

By llama.cpp's own converter. Before the weights are converted, llama.cpp's tokenizer is compared
with transformers' (:mod:`quantize.workers.gguf_convert`); the audit compares the weights. Writes
`model/BF16.gguf` and `gguf.json`::

    {"file": name below `model/`, "bytes": int, "name": what the file calls the model,
     "tokenizer": {"texts", "tokens", "special_tokens", "chats"},     # how much was compared
     "seconds": {"tokenizer", "convert"}, "peak_memory_bytes": int, "versions": {tool: version}}
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from quantize.checkpoint import model_folder
from quantize.protocol import write_json
from quantize.stages.base import Resolved, StageContext

VERSION = 1

FILE = "BF16.gguf"


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """llama.cpp's."""
    return ("llamacpp",)


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """What the file calls the model; the rest is the source's."""
    return {"name": model_name(resolved)}


def model_name(resolved: Resolved) -> str:
    """`general.name`: the source's last part, which llama.cpp and Ollama show."""
    return PurePosixPath(resolved.recipe.model.source).name or resolved.recipe.name


def run(context: StageContext) -> None:
    """Run the worker; what it refuses is a SourceError, before anything is quantized."""
    fetched = context.inputs["fetch"]
    folder = context.files / "model"
    folder.mkdir()
    output, name = folder / FILE, model_name(context.resolved)
    result = context.runner.worker(
        "llamacpp",
        "gguf_convert",
        {
            "model": str(model_folder(fetched)),
            "output": str(output),
            "name": name,
            "weight_bytes": fetched.json("source.json")["weight_bytes"],
        },
        work=context.work,
        label="gguf",
        env={"HF_HUB_OFFLINE": "1"},
    )
    context.versions.update(result["versions"])
    about = {"file": FILE, "bytes": output.stat().st_size, "name": name}
    write_json(context.files / "gguf.json", about | result)
