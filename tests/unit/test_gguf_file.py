"""The GGUF reader: what it reads, and what it refuses without allocating what a file asks for."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.errors import SourceError
from quantize.gguf.file import TYPES, read_gguf
from quantize.gguf.values import DEQUANTIZE, SCALES, block_scales, dequantized

METADATA = {"general.architecture": "llama", "general.file_type": 7, "tokens": ["a", "b"]}
VALUES = np.arange(128, dtype=np.float32).reshape(2, 64)
TENSORS = {
    "a": gguf_files.q8_0(VALUES),
    "b": gguf_files.f32(np.ones(3)),
    "c": gguf_files.bf16(VALUES),
}


def read(tmp_path: Path, data: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, gguf_files.gguf_bytes(METADATA, TENSORS))
    assert found.metadata == METADATA
    assert {name: (t.type.name, t.shape) for name, t in found.tensors.items()} == {
        "a": ("Q8_0", (2, 64)),
        "b": ("F32", (3,)),
        "c": ("BF16", (2, 64)),
    }
    exact, ours = found.tensors["c"], found.tensors["a"]
    assert np.array_equal(dequantized(np.asarray(exact.load()), exact.type), VALUES)
    assert np.abs(dequantized(np.asarray(ours.load()), ours.type) - VALUES).max() < 0.6
    assert found.weight_bytes == 2 * 2 * 34 + 12 + 256


def spoiled(**changes: int) -> bytes:
    """The good file with its counts replaced: `version`, `tensors`, `entries`."""
    data = bytearray(gguf_files.gguf_bytes(METADATA, TENSORS))
    places = {"version": (4, "<I"), "tensors": (8, "<Q"), "entries": (16, "<Q")}
    for name, value in changes.items():
        at, form = places[name]
        data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(data)


def one_entry(raw: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("k") + raw


def one_tensor(dimensions: list[int], kind: int, offset: int, count: int | None = None) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_files.text("t")
    head += struct.pack("<I", len(dimensions) if count is None else count)
    head += b"".join(struct.pack("<Q", extent) for extent in dimensions)
    head += struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32 + 4096)


GOOD = gguf_files.gguf_bytes(METADATA, TENSORS)
HOSTILE = {
    "empty": (b"", "truncated"),
    "safetensors": (b"\x08\0\0\0\0\0\0\0{}      ", "does not start with GGUF"),
    "a pickle": (b"\x80\x04" + b"x" * 600, "a Python pickle"),
    "an old version": (spoiled(version=2), "its version is 2"),
    "big endian": (spoiled(version=3 << 24), "its version is"),
    "tensors without end": (spoiled(tensors=2**63), "tensors (at most"),
    "entries without end": (spoiled(entries=2**64 - 1), "metadata entries (at most"),
    "more tensors than there are": (spoiled(tensors=150_000), "tensor  is larger"),
    "a key without end": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60),
        "bytes in a key (at most",
    ),
    "a text without end": (one_entry(struct.pack("<IQ", 8, 2**62)), "bytes in k (at most"),
    "an array without end": (one_entry(struct.pack("<IIQ", 9, 4, 2**62)), "elements in k"),
    "a long array": (one_entry(struct.pack("<IIQ", 9, 12, 1 << 27)), "truncated"),
    "arrays in arrays": (one_entry(struct.pack("<IIQ", 9, 9, 1)), "an array of the type 9"),
    "an unknown kind": (one_entry(struct.pack("<I", 77)), "the unknown type 77"),
    "many dimensions": (one_tensor([1] * 4, 0, 0, count=2**31), "dimensions"),
    "a huge tensor": (one_tensor([2**62, 2**62], 0, 0), "larger than any disk"),
    "a product beyond the file": (one_tensor([2**40, 2**40], 0, 0), "truncated"),
    "an unknown format": (one_tensor([32], 999, 0), "the type 999"),
    "rows that are no blocks": (one_tensor([33], 8, 0), "no whole blocks"),
    "an offset beyond the file": (one_tensor([32], 0, 1 << 40), "follows a hole"),
    "an offset that wraps": (one_tensor([32], 0, 2**64 - 32), "larger than any disk"),
    "cut short": (GOOD[:-200], "truncated"),
    "cut in the header": (GOOD[:60], "truncated"),
    "too long": (GOOD + b"\0" * 64, "its header accounts for"),
    "no alignment": (
        gguf_files.gguf_bytes({"general.alignment": 0}, {}),
        "its alignment is 0",
    ),
    "an odd alignment": (gguf_files.gguf_bytes({"general.alignment": 48}, {}), "alignment"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    data, fault = HOSTILE[name]
    with pytest.raises(SourceError) as caught:
        read(tmp_path, data)
    assert fault in caught.value.message
    assert "x.gguf" in caught.value.message


def test_a_header_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.gguf.file.HEADER_LIMIT_BYTES", 1 << 20)
    longest = one_entry(struct.pack("<I", 8) + gguf_files.text("x" * (1 << 20)))
    with pytest.raises(SourceError, match="a header of more than 1 MiB"):
        read(tmp_path, longest)
    read(tmp_path, one_entry(struct.pack("<I", 8) + gguf_files.text("x" * ((1 << 20) - 64))))


def test_a_key_or_a_tensor_twice(tmp_path: Path) -> None:
    twice = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * gguf_files.entry("k", "v")
    with pytest.raises(SourceError, match="has k twice"):
        read(tmp_path, twice)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bytes_end_in_a_file_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    spoilt = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SourceError):
        read(tmp_path, bytes(spoilt))


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_every_format_is_linear_in_its_scales(name: str) -> None:
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (4, kind.bytes), dtype=np.uint8)
    halves = np.array([0.5, 0.25], "<f2").view("u1").reshape(2, 2)
    for at, half in zip(SCALES[name], halves, strict=False):
        blocks[:, at : at + 2] = half
    values = dequantized(blocks, kind)
    assert values.shape == (4, kind.elements)
    assert np.isfinite(values).all()
    assert np.array_equal(block_scales(blocks, kind)[:, 0], np.full(4, 0.5))
    doubled = blocks.copy()
    for at in SCALES[name]:
        doubled[:, at : at + 2] = (blocks[:, at : at + 2].copy().view("<f2") * 2).view("u1")
    assert np.allclose(dequantized(doubled, kind), 2 * values)
    zero = blocks.copy()
    for at in SCALES[name]:
        zero[:, at : at + 2] = 0
    assert not dequantized(zero, kind).any()
