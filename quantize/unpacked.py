"""A quantized checkpoint with its weights unpacked to BF16, for servers that lack a kernel.

Of a scheme that leaves activations alone, packed and unpacked weights are the same function: a
kernel for packed weights computes scale * (q - zero point) itself, and multiplies in BF16. So what
quantizing cost can be measured on any machine; what a kernel does, and how fast, cannot.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.errors import ToolError
from quantize.formats import WeightFormat, module_formats, weight_format
from quantize.model_files import INDEX, read_json_object
from quantize.modules import module_name
from quantize.protocol import write_json
from quantize.recipe import Quantize
from quantize.remote_code import LET_IN
from quantize.tensors import TensorInfo, chunks, from_float32

ROWS = 1024
"""Of a weight that are unpacked at a time: for 8192 columns 32 MiB in FP32."""

CACHE_SCALES = (".k_scale", ".v_scale")
"""Of an FP8 KV cache; they go with the config that asks for one."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Planned:
    """A tensor of the unpacked checkpoint: copied, or made from the parts of a module."""

    dtype: str
    shape: tuple[int, ...]
    copied: TensorInfo | None = None
    parts: dict[str, TensorInfo] | None = None
    form: WeightFormat | None = None

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.copied.bytes if self.copied else 2 * int(np.prod(self.shape))

    def data(self) -> Iterator[bytes]:
        """Its bytes in pieces."""
        if self.copied is not None:
            for piece in chunks(self.copied):
                yield piece.tobytes()
            return
        assert self.form is not None
        assert self.parts is not None
        rows, columns = self.shape
        for start in range(0, rows, ROWS):
            wanted = np.arange(start, min(start + ROWS, rows))
            values = self.form.dequantized_rows(self.parts, wanted, columns)
            yield from_float32(np.ascontiguousarray(values, dtype=np.float32), "BF16").tobytes()


def is_weight_only(quantize: Quantize) -> bool:
    """Whether no scheme of the recipe quantizes activations."""
    schemes = [quantize.effective_scheme, *(part.scheme for part in quantize.overrides)]
    return all(weight_format(scheme, None).activations is None for scheme in schemes)


def write_unpacked(
    artifact: Path, source: Path, quantize: Quantize, target: Path, on_progress: OnProgress
) -> None:
    """Write the checkpoint `artifact` to `target`, every weight in the source's shape, unpacked.

    `source` is what `artifact` was made from, by `quantize`. An earlier `target` is replaced.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    made = read_checkpoint(artifact, allow_quantized=True, code=LET_IN)
    planned = _plan(made, read_checkpoint(source, code=LET_IN), quantize)
    by_file: dict[str, dict[str, _Planned]] = defaultdict(dict)
    for name, tensor in planned.items():
        first = tensor.copied or next(iter((tensor.parts or {}).values()))
        by_file[first.file.name][name] = tensor
    total, done = sum(tensor.size for tensor in planned.values()), 0
    for file, tensors in sorted(by_file.items()):
        _write_shard(target / file, tensors)
        done += sum(tensor.size for tensor in tensors.values())
        on_progress(done, total)
    _write_rest(artifact, target, {name: file for file in by_file for name in by_file[file]}, total)


def _plan(made: Checkpoint, source: Checkpoint, quantize: Quantize) -> dict[str, _Planned]:
    """Every tensor of the unpacked checkpoint by name."""
    formats = module_formats(quantize)
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in made.tensors.items():
        if not name.endswith(CACHE_SCALES):
            module = module_name(name)
            modules[module][name.removeprefix(module).lstrip(".")] = info
    planned = {}
    for module, parts in modules.items():
        form = formats.of(module) if "weight_scale" in parts else None
        for suffix, info in parts.items():
            if form is None or suffix == "bias":
                planned[info.name] = _Planned(info.dtype, info.shape, copied=info)
        if form is not None:
            weight = source.tensors.get(f"{module}.weight")
            if weight is None:
                raise ToolError(f"{module} is quantized, and the source has no such weight")
            planned[weight.name] = _Planned("BF16", weight.shape, parts=parts, form=form)
    return planned


def _write_shard(path: Path, tensors: dict[str, _Planned]) -> None:
    """One safetensors file: length of the header, header, data."""
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
        for tensor in tensors.values():
            for piece in tensor.data():
                file.write(piece)


def _write_rest(artifact: Path, target: Path, places: dict[str, str], total: int) -> None:
    """Config without the quantization, the index, and all other files as they are."""
    for path in artifact.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
    config = read_json_object(target / "config.json")
    config.pop("quantization_config", None)
    write_json(target / "config.json", config)
    if (artifact / INDEX).exists():
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
