"""A checkpoint written anew tensor by tensor, a piece at a time: memory does not grow with it."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.model_files import INDEX
from quantize.protocol import write_json
from quantize.tensors import DTYPES, TensorInfo, chunks

OnProgress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the new checkpoint: its form, its place, and how its bytes are made."""

    dtype: str
    shape: tuple[int, ...]
    file: str  # name of the shard
    data: Callable[[], Iterator[bytes]]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def copy(cls, info: TensorInfo) -> Planned:
        """A tensor that stays as it is, where it is."""

        def data() -> Iterator[bytes]:
            for piece in chunks(info):
                yield piece.tobytes()

        return cls(info.dtype, info.shape, info.file.name, data)


def write_checkpoint(
    target: Path,
    planned: Mapping[str, Planned],
    source: Path,
    files: Iterable[str],
    config: Mapping[str, Any],
    on_progress: OnProgress,
) -> None:
    """Write the tensors, an index where `source` has one, `config`, and copies of `files` of it.

    `target` is an empty folder. Weights, index and config among `files` are passed over.
    """
    by_file: dict[str, dict[str, Planned]] = defaultdict(dict)
    for name, tensor in planned.items():
        by_file[tensor.file][name] = tensor
    total, done = sum(tensor.size for tensor in planned.values()), 0
    for file, tensors in sorted(by_file.items()):
        for count in _write_shard(target / file, tensors):
            done += count
            on_progress(done, total)
    for name in files:
        if not name.endswith(".safetensors") and name not in (INDEX, "config.json"):
            shutil.copyfile(source / name, target / name)
    write_json(target / "config.json", dict(config))
    if (source / INDEX).exists():
        places = {name: tensor.file for name, tensor in planned.items()}
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_shard(path: Path, tensors: Mapping[str, Planned]) -> Iterator[int]:
    """One safetensors file: length of the header, header, data. Yields bytes as they are done."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.size
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            written = 0
            for piece in tensor.data():
                written += len(piece)
                file.write(piece)
            if written != tensor.size:
                raise AssertionError(f"{name}: {written} bytes were made, {tensor.size} promised")
            yield written
