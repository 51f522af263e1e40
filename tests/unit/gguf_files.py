"""GGUF files written by the specification, byte by byte; nothing is shared with the reader."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

TEXT, ARRAY, U32 = 8, 9, 4

Tensor = tuple[int, tuple[int, ...], bytes]  # ggml's type, shape (rows, columns), data


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value: Any) -> bytes:
    """A metadata entry: text, a whole number, or a list of texts."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", TEXT) + text(value)
    if isinstance(value, list):
        parts = b"".join(map(text, value))
        return text(key) + struct.pack("<IIQ", ARRAY, TEXT, len(value)) + parts
    return text(key) + struct.pack("<II", U32, value)


def gguf_bytes(
    metadata: dict[str, Any], tensors: dict[str, Tensor], *, version: int = 3, align: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", extent) for extent in reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % align)
    return head + b"\0" * (-len(head) % align) + data


def f32(values: np.ndarray) -> Tensor:
    return 0, values.shape, values.astype("<f4").tobytes()


def bf16(values: np.ndarray) -> Tensor:
    return 30, values.shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def q8_0(values: np.ndarray) -> Tensor:
    """Rounded to nearest, blocks of 32 with an FP16 scale."""
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    safe = np.where(scale == 0, 1, scale).astype(np.float32)
    numbers = np.round(blocks / safe).clip(-127, 127).astype("i1")
    raw = np.concatenate([scale.view("u1"), numbers.view("u1")], axis=1)
    return 8, values.shape, raw.tobytes()


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path
