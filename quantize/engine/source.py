"""The source checkpoint: tensors by name, read when they are needed, the next ones in advance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from quantize.protocol import WorkerError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Tensors = dict[str, torch.Tensor]


class Source:
    """A folder of safetensors shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files(folder)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the checkpoint."""
        return frozenset(self._file_of)

    def fingerprint(self) -> str:
        """sha256 over every shard's name, size and header, and the config: cheap, not of contents.

        The contents are in the store's key; this tells one checkpoint's journal from another's.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in sorted(set(self._file_of.values())):
            path = self.folder / name
            digest.update(f"{name} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
        return digest.hexdigest()

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> Tensors:
        """Copies of these tensors in memory; floating point ones as `dtype` if one is given.

        A copy, not a view of the mapped file: the file can be closed, so that its pages do not
        count as this process's, and reading happens here and not in the midst of a product.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: Tensors = {}
        for file, wanted in sorted(by_file.items()):
            with safe_open(self.folder / file, framework="pt") as opened:
                for name in wanted:
                    tensor = opened.get_tensor(name)
                    cast = dtype if tensor.is_floating_point() and dtype is not None else None
                    tensors[name] = tensor.to(cast, copy=True) if cast else tensor.clone()
        return tensors

    def read_ahead(
        self, wanted: Iterable[list[str]], dtype: torch.dtype | None = None
    ) -> Iterator[Tensors]:
        """:meth:`read` for each list of names; the next is read while the caller uses this one."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            waiting: Future[Tensors] | None = None
            for names in wanted:
                following = pool.submit(self.read, names, dtype)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()


def _files(folder: Path) -> dict[str, str]:
    """Tensor name → file name."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), SINGLE)
    raise WorkerError("SourceError", f"{folder} has neither {SINGLE} nor {INDEX}")
