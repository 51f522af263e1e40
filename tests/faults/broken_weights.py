"""Weights, headers and indices that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.faults.place import (
    BAD_JSON,
    CONTENTS,
    INDEX,
    Case,
    Place,
    Spoil,
    written,
    zip_,
)
from tests.unit.checkpoints import safetensors_bytes


def weights() -> Iterator[Case]:
    for kind, (content, words) in CONTENTS.items():
        yield Case(f"weights-{kind}", written("model/model.safetensors", content), words)
    yield Case("weights-gone", lambda p: (p.model / "model.safetensors").unlink(), "no weights in")
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"):
        yield Case(f"only-{name}", lambda p, n=name: (p.model / "model.safetensors").rename(
            p.model / n), "only pickled weights")  # fmt: skip
    yield Case("only-gguf", lambda p: (p.model / "model.safetensors").rename(
        p.model / "model-Q4_K_M.gguf"), "GGUF weights")  # fmt: skip
    for name in ("model.zip", "model.tar.gz", "model.7z"):
        yield Case(f"only-{name}", lambda p, n=name: (p.model / "model.safetensors").rename(
            p.model / n), "holds archives")  # fmt: skip
        yield Case(f"source-is-{name}", lambda p, n=name: (
            p.write(n, zip_()), p.recipe("source: model", f"source: {n}")),
            "a zip archive")  # fmt: skip
    yield Case("source-is-gguf", lambda p: (
        p.write("model.gguf", b"GGUF" + bytes(60)),
        p.recipe("source: model", "source: model.gguf")), "is a GGUF file")  # fmt: skip
    yield Case("source-is-text", lambda p: p.recipe("source: model", "source: prompts.yaml"),
               "is a file, not a folder")  # fmt: skip


def _header(header: bytes | dict[str, Any], data: bytes = bytes(8), length: int | None = None):  # type: ignore[no-untyped-def]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return written("model/model.safetensors", size + text + data)


def _one(**change: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


def headers() -> Iterator[Case]:
    w = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    table: dict[str, tuple[Spoil, str]] = {
        "length-2^63": (_header(_one(), length=1 << 63), "a header of"),
        "length-max": (_header(_one(), length=(1 << 64) - 1), "a header of"),
        "length-too-long": (_header(_one(), length=5000), "is truncated"),
        "length-too-short": (_header(_one(), length=20), "cannot be read"),
        "length-zero": (_header(_one(), length=0), "cannot be read"),
        "large": (_header(b"{" + b" " * (33 << 20)), "a header of"),
        "nested": (_header(b'{"w": ' + b"[" * 100_000), "nested too deeply"),
        "latin1": (_header(b'{"\xe4": 1}'), "cannot be read"),
        "list": (_header(b"[1]"), "does not start with"),
        "twice": (_header(b'{"w": {}, "w": {}}'), "repeated name"),
        "unknown-dtype": (_header(_one(dtype="F31")), "unknown dtype"),
        "escape-in-dtype": (_header(_one(dtype="\x1b[31m")), "unknown dtype \\x1b[31m"),
        "escape-in-name": (_header({"\x1b]0;x\x07": 1}), "\\x1b]0;x\\x07"),
        "surrogate-in-name": (_header(b'{"\\ud800": 1}'), "\\ud800"),
        "bidi-in-name": (_header({"a\u202eb": 1}), "a\\u202eb"),
        "newline-in-name": (_header({"a\nerror: b": 1}), "a\\nerror: b"),
        "long-name": (_header({"w" * 100_000: 1}), "www..."),
        "not-an-object": (_header({"w": 1}), "not described by"),
        "no-offsets": (_header({"w": {"dtype": "F32", "shape": [2]}}), "not described by"),
        "three-offsets": (_header(_one(data_offsets=[0, 4, 8])), "not described by"),
        "bool-offsets": (_header(_one(dtype="U8", shape=[1], data_offsets=[False, True])),
                         "data_offsets"),
        "float-offsets": (_header(_one(data_offsets=[0.0, 8.0])), "data_offsets"),
        "negative-offsets": (_header(_one(data_offsets=[-8, 0])), "data_offsets"),
        "reversed": (_header(_one(data_offsets=[8, 0])), "takes 8 bytes"),
        "offset-digits": (_header(b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, '
                                  + b"9" * 4000 + b"]}}"), "a number of"),
        "offset-5000-digits": (_header(b'{"w": {"shape": [' + b"9" * 5000 + b"]}}"), "cannot be"),
        "bool-shape": (_header(_one(shape=[True, 2])), "has the shape"),
        "negative-shape": (_header(_one(shape=[-2])), "has the shape"),
        "float-shape": (_header(_one(shape=[2.0])), "has the shape"),
        "nan-shape": (_header(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'),
                      "has the shape"),
        "text-shape": (_header(_one(shape="2")), "not described by"),
        "overflowing-shape": (_header(_one(shape=[1 << 32, 1 << 32])), "takes"),
        "digits-shape": (_header(b'{"w": {"dtype": "F32", "shape": [%s,%s], "data_offsets": [0,8]}}'
                                 % (b"9" * 4000, b"9" * 4000)), "has the shape"),
        "many-dimensions": (_header(_one(shape=[1] * 100_000)), "has the shape"),
        "wrong-size": (_header(_one(shape=[3])), "takes 12 bytes"),
        "overlap": (_header({"a": w, "b": w}, bytes(4)), "overlaps"),
        "hole": (_header({"a": w, "b": w | {"data_offsets": [8, 12]}}, bytes(12)), "a hole"),
        "beyond": (_header(_one(shape=[2000], data_offsets=[0, 8000])), "is truncated"),
        "left-over": (_header(_one(), bytes(99)), "accounts for"),
        "metadata-list": (_header({"__metadata__": [1], **_one()}), "__metadata__"),
        "metadata-number": (_header({"__metadata__": {"a": 1}, **_one()}), "__metadata__"),
        "terabyte": (lambda p: _lying_terabyte(p), "accounts for"),
    }  # fmt: skip
    for kind, (spoil, words) in table.items():
        yield Case(f"header-{kind}", spoil, words)


def _lying_terabyte(place: Place) -> None:
    path = place.model / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(1 << 40)


def _with_index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(place: Place) -> None:
        weight_map = place.shards()
        place.index(change(weight_map))

    return spoil


def _set(shard: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weight_map: weight_map | {"lm_head.weight": shard}


def _rewritten(change: Callable[[dict[str, str]], dict[str, str]], tensor: str) -> Spoil:
    """A tensor more in the first shard, and another index."""

    def spoil(place: Place) -> None:
        weight_map = place.shards()
        first = place.model / "model-00001-of-00002.safetensors"
        tensors = {tensor: ("BF16", np.zeros((4, 4), "<u2"))}
        first.write_bytes(safetensors_bytes(tensors))
        place.index(change(weight_map))

    return spoil


def indices() -> Iterator[Case]:
    bad = {
        "up": "../model.safetensors", "absolute": "/etc/x.safetensors", "folder": "a/b.safetensors",
        "nul": "a\0.safetensors", "newline": "a\n.safetensors", "escape": "\x1b[2J.safetensors",
        "long": "w" * 300 + ".safetensors", "backslash": "..\\x.safetensors", "dots": "..",
        "empty": "", "number": 1, "list": ["a"], "null": None, "home": "~/x.safetensors",
    }  # fmt: skip
    for kind, shard in bad.items():
        yield Case(f"index-{kind}", _with_index(_set(shard)), "not in a file beside it")
    yield Case("index-pickle", _with_index(_set("pytorch_model.bin")), "not a safetensors file")
    yield Case("index-missing", _with_index(_set("model-00003-of-00003.safetensors")), "is missing")
    yield Case("index-case", _with_index(_set("MODEL-00001-of-00002.safetensors")), "is missing")
    yield Case("index-unicode", _with_index(_set("mode\u0301l.safetensors")), "is missing")
    yield Case("index-is-list", _with_index(lambda _: [1]), "has no weight_map")
    yield Case("index-is-empty", _with_index(lambda _: {}), "has no weight_map")
    yield Case("index-other-shard", _with_index(lambda m: m | {
        "model.norm.weight": m["lm_head.weight"], "lm_head.weight": m["model.norm.weight"]}),
        "lacks tensor")  # fmt: skip
    yield Case("index-forgets", _with_index(lambda m: {
        k: v for k, v in m.items() if k != "lm_head.weight"}), "does not put there")  # fmt: skip
    yield Case("index-invents", _with_index(lambda m: m | {"x.weight": m["lm_head.weight"]}),
               "lacks tensor x.weight")  # fmt: skip
    yield Case("shard-lacks", _rewritten(lambda m: m, "x.weight"), "lacks tensors")
    yield Case("tensor-twice", _rewritten(lambda m: m, "lm_head.weight"), "lm_head.weight")
    yield Case("shard-extra", lambda p: (p.shards(), p.write(
        "model/other.safetensors", safetensors_bytes({}))), "belongs to no part")  # fmt: skip
    yield Case("single-beside-index", lambda p: (p.shards(), p.write(
        "model/model.safetensors", safetensors_bytes({}))), "belongs to no part")  # fmt: skip
    for kind, (content, _) in BAD_JSON.items():
        yield Case(f"index-json-{kind}", lambda p, c=content: (
            p.shards(), p.write(f"model/{INDEX}", c)), INDEX)  # fmt: skip
