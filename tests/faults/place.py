"""A folder with a recipe and all it names, and what may stand in the place of a file."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint import read_checkpoint
from tests.unit.adapters import write_adapter
from tests.unit.checkpoints import llama_config, llama_tensors, write_checkpoint

RECIPE = """\
version: 1
name: tiny
model:
  source: model
calibration:
  source: rows.jsonl
  sequence_length: 64
quantize:
  method: awq
  group_size: 32
evaluate:
  suite: suite.yaml
environments:
  llmcompressor:
    python: nowhere/bin/python
"""
SUITE = """\
version: 1
name: mine
smoke: prompts.yaml
perplexity:
  text: held-out.jsonl
  window: 64
load: {requests: 1, concurrency: 1, input_tokens: 8, output_tokens: 8}
"""
PROMPTS = "version: 1\nname: p\nprompts:\n- {name: a, kind: completion, prompt: x}\n"
ROWS = "".join(json.dumps({"text": f"Row {n} says something of its own."}) + "\n" for n in range(9))

SOUND = (4, "environments.llmcompressor.python")
"""Exit code and words where nothing is wrong with the inputs but the recipe's interpreter."""


class Marker:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@dataclass(frozen=True)
class Place:
    """A recipe with its inputs, and a folder beside it that nothing may be written to."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def marker(self) -> Path:
        return self.folder / "executed"

    @classmethod
    def make(cls, folder: Path) -> Place:
        write_checkpoint(folder / "model", llama_tensors(layers=1), llama_config(layers=1))
        (folder / "outside").mkdir()
        texts = {"recipe.yaml": RECIPE, "suite.yaml": SUITE, "prompts.yaml": PROMPTS}
        texts |= {"rows.jsonl": ROWS, "held-out.jsonl": ROWS, "outside/secret.json": "{}"}
        for name, text in texts.items():
            (folder / name).write_text(text)
        write_adapter(folder / "adapter", read_checkpoint(folder / "model"))
        return cls(folder)

    def write(self, name: str, content: bytes | str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def edit(self, name: str, **change: Any) -> None:
        value = json.loads((self.folder / name).read_text()) | change
        self.write(name, json.dumps(value))

    def recipe(self, old: str, new: str) -> None:
        text = (self.folder / "recipe.yaml").read_text()
        assert old in text
        self.write("recipe.yaml", text.replace(old, new, 1))

    def shards(self) -> dict[str, str]:
        """The weights in two files; the index's weight_map."""
        (self.model / "model.safetensors").unlink()
        write_checkpoint(self.model, llama_tensors(layers=1), llama_config(layers=1), shards=2)
        index = json.loads((self.model / INDEX).read_text())
        return dict(index["weight_map"])

    def index(self, weight_map: Any) -> None:
        self.write(f"model/{INDEX}", json.dumps({"metadata": {}, "weight_map": weight_map}))


INDEX = "model.safetensors.index.json"
Spoil = Callable[[Place], None]


@dataclass(frozen=True)
class Case:
    """One broken input: what the message must hold, and the exit code."""

    name: str
    spoil: Spoil
    words: str
    code: int = 3


def written(name: str, content: bytes | str) -> Spoil:
    return lambda place: place.write(name, content)


def replaced(place: Place, name: str, make: Callable[[Path], object]) -> None:
    path = place.folder / name
    path.unlink(missing_ok=True)
    make(path)


def socket_(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket has room for a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path: Path, size: int = 1 << 40) -> None:
    """A file of holes that takes no disk."""
    with open(path, "wb") as file:
        file.truncate(size)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": socket_,
    "link-outside": lambda path: path.symlink_to(path.parents[1] / "outside/secret.json"),
    "link-relative": lambda path: path.symlink_to("../outside/secret.json"),
    "link-device": lambda path: path.symlink_to("/dev/zero"),
    "link-nowhere": lambda path: path.symlink_to("nowhere.json"),
    "link-ring": lambda path: path.symlink_to(path.name),
    "terabyte": sparse,
}


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "half": (b'{"a": ', "not valid JSON"),
    "list": (b"[1, 2]", "holds a list"),
    "text": (b'"x"', "holds a str"),
    "nested": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "twice": (b'{"a": 1, "a": 2}', "repeated name 'a'"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "latin1": (b'{"a": "\xe4"}', "not UTF-8"),
    "nul": (b"\x00" * 64, "not valid JSON"),
    "web-page": (b"<!DOCTYPE html><html>404</html>", "not valid JSON"),
    "pickle": (pickle.dumps({"a": 1}), "not UTF-8"),
    "comment": (b'{"a": 1} // yes', "not valid JSON"),
}


def zip_() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    return file.getvalue()


def tar_() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../evil"))
    return file.getvalue()


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "short": (b"abc", "it has 3 bytes"),
    "zip": (zip_(), "a zip archive"),
    "tar": (tar_(), "a tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "a gzip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7z archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file"),
    "web-page": (b"<!DOCTYPE html><html><title>404</title></html>", "a web page"),
    "error": (b'{"error":"Repository not found"}', "an error message"),
    "pickle-2": (pickle.dumps({"w": [1.0] * 9}, 2), "a Python pickle"),
    "pickle-4": (pickle.dumps({"w": [1.0] * 9}, 4), "a Python pickle"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "zeros": (bytes(4096), "zeros"),
    "program": (b"\x7fELF" + bytes(60), "a program"),
    "hdf5": (b"\x89HDF\r\n" + bytes(60), "an HDF5 file"),
    "numpy": (b"\x93NUMPY" + bytes(60), "a numpy array"),
    "noise": (bytes(range(7, 255)), "does not start with"),
}


def with_adapter(spoil: Spoil) -> Spoil:
    def both(place: Place) -> None:
        place.recipe("source: model\n", "source: model\n  adapter: adapter\n")
        spoil(place)

    return both
