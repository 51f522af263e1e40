"""What the workers of the llamacpp environment share: its programs and its tokenizer.

The programs lie beside the interpreter (`envs/llamacpp.cmake`).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from quantize.protocol import WorkerError

LAST_LINES = 15
BLOCK_BYTES = 1 << 16

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep, as for the server (servers/llamacpp.py): libgomp's spin,
which is slow where others use the cores, too."""


def program(name: str) -> str:
    """Path of one of llama.cpp's programs; a ToolError where the environment has none."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise WorkerError(
            "ToolError",
            f"{path} is not there: the environment has llama-cpp-python alone, and not llama.cpp's "
            "programs",
            "remove environments.llamacpp from the recipe, so that quantize builds its own",
        )
    return str(path)


def run_program(command: list[str], seen: Callable[[bytes], None], what: str, folder: Path) -> None:
    """Run a program in `folder` to its end; `seen` gets its output so far, for progress.

    The output goes to this worker's own, which is the stage's log. Raises ToolError with its last
    lines where it fails.
    """
    print(" ".join(command), flush=True)
    output = b""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | PASSIVE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        while block := os.read(process.stdout.fileno(), BLOCK_BYTES):
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            output += block
            seen(output)
        code = process.wait()
    if code != 0:
        lines = output.decode("utf-8", "replace").rstrip().splitlines()[-LAST_LINES:]
        raise WorkerError("ToolError", "\n".join([f"{what} ended with exit code {code}:", *lines]))


def versions() -> dict[str, str]:
    """Of llama.cpp (its own number and the commit it was built from) and what converts."""
    said = subprocess.run(
        [program("llama-imatrix"), "--version"], capture_output=True, text=True, check=False
    )
    text = said.stdout + said.stderr
    found = re.search(r"version: (\S+) \(build (\d+), commit (\w+)\)", text)
    names = ("llama-cpp-python", "transformers", "torch")
    return {
        "llama.cpp": f"{found[1]} (commit {found[3]})" if found else "unknown",
        **{name: importlib.metadata.version(name) for name in names},
    }


def peak_memory_bytes() -> int:
    """The most resident memory of this process, or of the largest program that it ran."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage.ru_maxrss for usage in used) * 1024


class Vocabulary:
    """A GGUF file's tokenizer, as llama.cpp runs it; the weights are not read."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise WorkerError(
                "SourceError",
                "llama.cpp cannot load the tokenizer that its converter wrote",
                "the log says why; the model's tokenizer may need a newer llama.cpp",
            )
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def ids(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids; `add_special` adds what the model's own settings say (BOS, EOS).

        Special tokens in the text are taken for what they say, as transformers does.
        """
        data = text.encode()
        room = len(data) + 16
        tokens = (llama_cpp.llama_token * room)()
        arguments: Any = (self._vocabulary, data, len(data), tokens, room, add_special, True)
        count = llama_cpp.llama_tokenize(*arguments)
        if count < 0:
            raise WorkerError("ToolError", f"llama.cpp needs {-count} tokens for {len(data)} bytes")
        return list(tokens[:count])

    def text(self, ids: list[int]) -> str:
        """What the ids stand for, special tokens included."""
        data = b""
        buffer = ctypes.create_string_buffer(4096)
        for token in ids:
            size = llama_cpp.llama_token_to_piece(
                self._vocabulary, token, buffer, len(buffer), 0, True
            )
            data += buffer.raw[: max(size, 0)]
        return data.decode("utf-8", "replace")
