"""What the card of a GGUF file says: the file table, how to get it, how to run it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from quantize.gguf.types import GGUF_TYPES
from quantize.report.results import Record, bytes_text

IMATRIX = "imatrix.gguf"


@dataclass(frozen=True)
class FileRow:
    """One line of the file table."""

    file: str
    type: str
    size: str
    bits: str  # per weight, over all tensors
    use: str


@dataclass(frozen=True)
class GgufCard:
    """Files and commands; `context` is the tokens that the commands ask for."""

    files: tuple[FileRow, ...]
    formats: str  # number formats with their tensors
    download: str
    server: str
    ollama: str
    python: str
    imatrix: str  # what the importance matrix was made from; empty without one


def gguf_card(record: Record) -> GgufCard | None:
    """None where the artifact is no GGUF file."""
    found = record["audit"].get("gguf")
    if found is None:
        return None
    file, target = found["file"], record.get("target")
    folder = f"./{record['recipe']['name']}"
    path = shlex.quote(f"{folder}/{file}")
    context = record["recipe"]["serve"].get("max_model_len")
    size = f" --ctx-size {context}" if context else ""
    name = record["recipe"]["name"]
    return GgufCard(
        files=(
            FileRow(
                file,
                found["type"],
                bytes_text(found["bytes"]),
                f"{found['bits_per_weight']:.2f}",
                GGUF_TYPES[found["type"]].use,
            ),
        ),
        formats=_formats(found["formats"]),
        download=f"hf download {target} --local-dir {folder}" if target else "",
        server=f"llama-server --model {path}{size} --jinja",
        ollama=f"cd {shlex.quote(folder)}\nollama create {shlex.quote(name)} -f Modelfile\n"
        f"ollama run {shlex.quote(name)}",
        python=_python(f"{folder}/{file}", context),
        imatrix=_imatrix(record["compress"]),
    )


def _formats(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} tensors {name}" for name, count in ordered)


def _python(path: str, context: int | None) -> str:
    size = f", n_ctx={context}" if context else ""
    return "\n".join(
        [
            "from llama_cpp import Llama",
            "",
            f"model = Llama({path!r}{size})",
            'message = {"role": "user", "content": "Hello"}',
            "print(model.create_chat_completion([message]))",
        ]
    )


def _imatrix(compress: dict[str, Any]) -> str:
    matrix = compress.get("imatrix")
    if matrix is None:
        return ""
    return (
        f"{matrix['tokens']:,} tokens of {matrix['rows']:,} calibration rows, in chunks of "
        f"{matrix['context']:,}"
    )
