"""Safetensors headers, memory maps and number formats."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import bf16, safetensors_bytes
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import SourceError
from quantize.tensors import (
    E4M3,
    chunks,
    from_float32,
    load_tensor,
    read_header,
    to_float32,
)

VALUES = np.arange(12, dtype="<f4").reshape(3, 4)
TENSORS = {
    "a": ("F32", VALUES),
    "b": ("BF16", bf16(VALUES)),
    "scalar": ("I64", np.array(7, "<i8")),
    "empty": ("F16", np.empty((0, 4), "<f2")),
}


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    return path


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    tensors = read_header(write(tmp_path, safetensors_bytes(TENSORS)))
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == {
        name: (dtype, values.shape) for name, (dtype, values) in TENSORS.items()
    }
    for name, (_, values) in TENSORS.items():
        assert np.array_equal(load_tensor(tensors[name]), values)
    assert np.array_equal(to_float32(load_tensor(tensors["b"]), "BF16"), VALUES)
    assert [len(chunk) for chunk in chunks(tensors["a"], 5)] == [5, 5, 2]
    assert np.array_equal(np.concatenate(list(chunks(tensors["a"], 5))), VALUES.reshape(-1))
    assert tensors["scalar"].elements == 1
    assert tensors["empty"].bytes == 0


def spoil(name: str, **change: object):
    def edit(header: dict) -> None:
        header[name].update(change)

    return edit


def drop_the_end(header: dict) -> None:
    del header["scalar"], header["empty"]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (spoil("a", dtype="F31"), "unknown dtype F31"),
        (spoil("a", shape=[3, 5]), "takes 60 bytes, not 48"),
        (spoil("a", shape=[-3, -4]), "has the shape"),
        (spoil("a", shape=[True, 12]), "has the shape"),
        (spoil("a", data_offsets=[0]), "not described"),
        (spoil("a", data_offsets=[48, 0]), "not -48"),
        (spoil("b", data_offsets=[40, 64]), "overlaps the tensor before it"),
        (spoil("b", data_offsets=[56, 80]), "follows a hole"),
        (drop_the_end, "accounts for"),
    ],
)
def test_a_header_that_the_format_forbids_is_refused(tmp_path: Path, edit, fault: str) -> None:
    path = write(tmp_path, safetensors_bytes(TENSORS, edit))
    with pytest.raises(SourceError, match=fault) as error:
        read_header(path)
    assert "model.safetensors" in error.value.message


def raw_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"\x01", "it has 1 bytes"),
        (raw_header(b'["a"]'), "does not start with"),
        (raw_header(b'{"a": '), "cannot be read"),
        (raw_header(b'{"a": "\xff"}'), "cannot be read"),
        (raw_header(b'{"a": {}, "a": {}}'), "repeated name 'a'"),
        (raw_header(b'{"a":' * 100_000), "cannot be read"),
        (raw_header(b'{"a": 1}'), "not described"),
        (struct.pack("<Q", 1 << 40) + b"{}", "a header of 1099511627776 bytes"),
        (struct.pack("<Q", 500) + b"{}", "needs 508 bytes, the file has 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git-lfs pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, raw: bytes, fault: str) -> None:
    with pytest.raises(SourceError, match=fault):
        read_header(write(tmp_path, raw))


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    whole = safetensors_bytes(TENSORS)
    path = write(tmp_path, whole[:-3])
    with pytest.raises(SourceError) as error:
        read_header(path)
    assert f"promises {len(whole)} bytes, the file has {len(whole) - 3}" in error.value.message


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_rounded_to_the_nearest_and_ties_to_even(value: float) -> None:
    values = np.array([value], np.float32)
    if abs(value) > 3e38:
        return  # rounds to infinity
    rounded = to_float32(from_float32(values, "BF16"), "BF16")[0]
    bits = int(values.view(np.uint32)[0])
    below = np.array([bits & 0xFFFF0000], np.uint32).view(np.float32)[0]
    above = np.array([(bits & 0xFFFF0000) + 0x10000], np.uint32).view(np.float32)[0]
    down, up = abs(float(value) - float(below)), abs(float(above) - float(value))
    even_below = not (bits >> 16) & 1
    assert rounded == (below if down < up or (down == up and even_below) else above)


def test_e4m3_has_the_values_of_the_ocp_specification() -> None:
    assert E4M3[0x7E] == 448  # the largest
    assert E4M3[0x01] == 2.0**-9  # the smallest subnormal
    assert E4M3[0x08] == 2.0**-6  # the smallest normal
    assert E4M3[0xB8] == -1
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    assert np.isfinite(np.delete(E4M3, [0x7F, 0xFF])).all()


def test_metadata_is_not_a_tensor(tmp_path: Path) -> None:
    raw = safetensors_bytes(TENSORS)
    assert "__metadata__" in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert "__metadata__" not in read_header(write(tmp_path, raw))
