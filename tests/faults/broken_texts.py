"""Adapters, calibration rows, held-out texts, recipes, suites and names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

from tests.faults.place import (
    BAD_JSON,
    CONTENTS,
    Case,
    Place,
    Spoil,
    with_adapter,
    written,
    zip_,
)
from tests.unit.checkpoints import safetensors_bytes


def adapters() -> Iterator[Case]:
    config = "adapter/adapter_config.json"
    weights = "adapter/adapter_model.safetensors"
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "type": ({"peft_type": "\x1b[31mX"}, "of type \\x1b[31mX"),
        "rank-zero": ({"r": 0}, "a rank of 0"),
        "rank-text": ({"r": "8"}, "a rank of '8'"),
        "rank-bool": ({"r": True}, "a rank of True"),
        "rank-list": ({"r": [1] * 10_000}, "a rank of ["),
        "pattern-list": ({"rank_pattern": [1]}, "is no mapping"),
        "pattern-broken": ({"rank_pattern": {"(": 4}}, "which is no pattern"),
        "pattern-rank": ({"rank_pattern": {"x": -1}}, "a rank of -1"),
        "pattern-flags": ({"rank_pattern": {"(?i)x": 4}}, "which is no pattern"),
        "targets-broken": ({"target_modules": "("}, "target_modules is '('"),
        "targets-numbers": ({"target_modules": [1]}, "target_modules is [1]"),
        "excluded-number": ({"exclude_modules": 1}, "exclude_modules is 1"),
        "saved-number": ({"modules_to_save": 1}, "modules_to_save is 1"),
        "layers-half": ({"layers_to_transform": 1.5}, "layers_to_transform is 1.5"),
    }
    for kind, (change, words) in changes.items():
        yield Case(f"adapter-{kind}", with_adapter(lambda p, c=change: p.edit(config, **c)), words)
    for kind in ("list", "nested", "twice", "latin1"):
        content = BAD_JSON[kind][0]
        yield Case(f"adapter-config-{kind}", with_adapter(written(config, content)),
                   "adapter_config.json")  # fmt: skip
    for kind in ("zip", "pickle-4", "gguf", "empty", "web-page"):
        content, words = CONTENTS[kind]
        yield Case(f"adapter-weights-{kind}", with_adapter(written(weights, content)), words)
    yield Case("adapter-pickled", with_adapter(lambda p: (p.folder / weights).rename(
        p.folder / "adapter/adapter_model.bin")), "only pickled weights")  # fmt: skip
    yield Case("adapter-no-tensors", with_adapter(written(weights, safetensors_bytes({}))),
               "holds no tensors")  # fmt: skip
    yield Case("adapter-empty-folder", with_adapter(lambda p: [
        path.unlink() for path in (p.folder / "adapter").iterdir()]),
        "holds no adapter")  # fmt: skip


def rows() -> Iterator[Case]:
    table: dict[str, tuple[bytes | str, str]] = {
        "empty": ("", "is empty"),
        "blank": ("\n \n\t\n", "is empty"),
        "latin1": (b'{"text": "a"}\n{"text": "\xe4"}\n', "rows.jsonl:2: not UTF-8"),
        "utf16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        "not-json": ('{"text": "a"}\nhello\n', "rows.jsonl:2: not JSON"),
        "nested": ('{"text": ' + "[" * 200_000 + "\n", "rows.jsonl:1: not JSON"),
        "digits": ('{"text": ' + "9" * 5000 + "}\n", "rows.jsonl:1: not JSON"),
        "long-line": (b'{"text": "' + b"x" * (17 << 20) + b'"}\n', "more than 16 MiB"),
        "zip": (zip_(), "a zip archive"),
        "gzip": (b"\x1f\x8b\x08" + bytes(30), "a gzip archive"),
        "pickle": (pickle.dumps([1]), "a Python pickle"),
        "parquet": (b"PAR1" + bytes(60), "a parquet file"),
        "web-page": ("<html>404", "a web page"),
        "numbers": ("1\n2\n3\n", "not an object"),
        "lists": ("[]\n[1]\n", "not an object"),
        "no-column": ('{"prompt": "a"}\n', "neither `messages` nor `text`"),
        "text-number": ('{"text": 1}\n', "`text` is no text"),
        "text-blank": ('{"text": "  "}\n', "empty text"),
        "text-half": ('{"text": "a\\ud800"}\n', "half a character"),
        "messages-text": ('{"messages": "hi"}\n', "no list of objects"),
        "messages-numbers": ('{"messages": [1, 2]}\n', "no list of objects"),
        "messages-no-role": ('{"messages": [{"content": "a"}]}\n', "without a `role`"),
        "messages-role": ('{"messages": [{"role": 1, "content": "a"}]}\n', "without a `role`"),
        "messages-content": ('{"messages": [{"role": "user", "content": 1}]}\n', "is no text"),
        "messages-half": ('{"messages": [{"role": "user", "content": "\\udfff"}]}\n', "half a"),
    }
    for kind, (content, words) in table.items():
        yield Case(f"rows-{kind}", written("rows.jsonl", content), words)
    for kind, content in {
        "empty": b"", "magic": b"PAR1", "noise": b"x" * 99,
        "footer": b"PAR1" + bytes(8) + b"\xff\xff\xff\x7f" + b"PAR1",
    }.items():  # fmt: skip
        yield Case(f"rows-parquet-{kind}", lambda p, c=content: (
            p.write("rows.parquet", c), p.recipe("rows.jsonl", "rows.parquet")),
            "rows.parquet")  # fmt: skip
    for kind, content in {"empty": b"\n\n", "latin1": b"\xe4", "line": b"x" * (17 << 20)}.items():
        yield Case(f"rows-txt-{kind}", lambda p, c=content: (
            p.write("rows.txt", c), p.recipe("rows.jsonl", "rows.txt")), "rows.txt")  # fmt: skip
    yield Case("rows-missing", lambda p: (p.folder / "rows.jsonl").unlink(), "rows.jsonl")
    yield Case("rows-up", lambda p: p.recipe("rows.jsonl", "../../../rows.jsonl"), "rows.jsonl")


def texts() -> Iterator[Case]:
    table: dict[str, tuple[bytes | str, str]] = {
        "empty": ("", "is empty"),
        "blank": ('{"text": " "}\n', "is empty"),
        "latin1": (b"\xe4\n", "held-out.jsonl:1"),
        "not-json": ("x\n", "held-out.jsonl:1"),
        "list": ("[1]\n", "held-out.jsonl:1"),
        "nested": ('{"text": ' + "[" * 200_000 + "\n", "held-out.jsonl:1"),
        "no-field": ('{"prompt": "a"}\n', "not an object with `text`"),
        "number": ('{"text": 1}\n', "not a text"),
        "half": ('{"text": "\\ud800"}\n', "half a character"),
    }
    for kind, (content, words) in table.items():
        yield Case(f"held-out-{kind}", written("held-out.jsonl", content), words)


YAML: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "is empty"),
    "list": ("- a\n", "expected keys and values"),
    "text": ("hello\n", "expected keys and values"),
    "latin1": (b"name: \xe4\n", "not UTF-8"),
    "utf16": ("name: a\n".encode("utf-16"), "not UTF-8"),
    "nul": (b"name: a\0b\n", "U+0000"),
    "escape": (b"name: \x1b[31m\n", "U+001B"),
    "tab": ("model:\n\tsource: a\n", "a tab"),
    "large": (b"# " + b"x" * (101 << 20), "larger than 256 KiB"),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "an anchor"),
    "merge": ("base: {a: 1}\n<<: {b: 2}\n", "merge key"),
    "tag": ("name: !!python/object/apply:os.system ['touch executed']\n", "a tag"),
    "tag-local": ("name: !exec 'touch executed'\n", "a tag"),
    "twice": ("name: a\nname: b\n", "given twice"),
    "deep-flow": ("a: " + "[" * 50_000, "nested more than"),
    "deep-block": ("\n".join(" " * n + "a:" for n in range(400)), "nested more than"),
    "two-documents": ("version: 1\n---\nversion: 1\n", "a second document"),
    "unclosed": ("a: [1, 2\n", "not valid YAML"),
    "quote": ('a: "b\n', "not valid YAML"),
    "surrogate": ('a: "\\ud800"\n', "surrogate"),
    "bad-escape": ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
    "digits": ("version: " + "9" * 900 + "\n", "more than 400 digits"),
    "long-plain": ("name: " + "1_" * 50_000 + "x\n", "more than 1000 characters"),
    "many-keys": ("".join(f"k{n}: 1\n" for n in range(20_000)), "unknown key"),
    "many-twice": ("a: 1\n" * 20_000, "given twice"),
    "carriage-return": ("version: 1\rname: a\rb: [\r", "not valid YAML"),
    "directive": ("%YAML 9.9\n---\na: 1\n", "recipe.yaml"),
    "key-list": ("[a, b]: 1\n", "a key must be plain text"),
    "null-key": ("~: 1\n", "unknown key"),
    "web-page": ("<!DOCTYPE html>\n<html>\n", "recipe.yaml"),
    "zip": (zip_(), "recipe.yaml"),
    "json": ('{"version": 1, "name": "a"}', "this key is required"),
}


def _published(folder: str) -> Spoil:
    def spoil(place: Place) -> None:
        text = f"publish:\n  folder: {place.folder / folder}\nenvironments:"
        place.recipe("environments:", text)

    return spoil


def folders() -> Iterator[Case]:
    """Places to publish to that are in use."""
    for kind, folder in {"source": "model", "in-source": "model/out", "around": "."}.items():
        yield Case(f"publish-{kind}", _published(folder), "publish.folder", 2)
    yield Case("publish-store", _published("../store/out"), "publish.folder", 2)
    yield Case("publish-link", lambda p: (
        (p.folder / "link").symlink_to("model"), _published("link/out")(p)),
        "overlaps", 2)  # fmt: skip


def recipes() -> Iterator[Case]:
    for kind, (content, words) in YAML.items():
        yield Case(f"recipe-{kind}", written("recipe.yaml", content), words, 2)
    changes = {
        "name-up": ("name: tiny", "name: ../../tiny", "does not fit"),
        "name-template": ("name: tiny", 'name: "{{ 7 * 7 }}"', "does not fit"),
        "name-html": ("name: tiny", "name: <script>", "does not fit"),
        "name-markup": ("name: tiny", 'name: "[red]tiny[/]"', "does not fit"),
        "name-long": ("name: tiny", f"name: {'a' * 500}", "does not fit"),
        "name-unicode": ("name: tiny", "name: tïny", "does not fit"),
        "pattern": ("group_size: 32", 'group_size: 32\n  ignore: ["re:("]', "regular expression"),
        "samples": ("sequence_length: 64", "sequence_length: 0", "too small"),
        "seed": ("sequence_length: 64", "seed: 99999999999999999999", "too large"),
        "engine": ("group_size: 32", "engine: os.system", "is not one of"),
        "environment": ("llmcompressor:", "evil:", "evil"),
    }
    for kind, (old, new, words) in changes.items():
        yield Case(f"recipe-{kind}", lambda p, o=old, n=new: p.recipe(o, n), words, 2)
    sources = {
        "missing": "nothing/here/at/all", "up": "../../../../nowhere", "url": "https://e.example/x",
        "dots": "a/../b", "pattern": "owner/na*me", "template": "'{{ cycler }}/x'",
        "markup": "'[link=https://e.example]x[/link]/y'", "long": "x" * 900,
    }  # fmt: skip
    for kind, source in sources.items():
        yield Case(f"source-{kind}", lambda p, s=source: p.recipe("source: model", f"source: {s}"),
                   "model.source: there is no folder")  # fmt: skip


def suites() -> Iterator[Case]:
    for name in ("suite.yaml", "prompts.yaml"):
        for kind in (
            "empty",
            "list",
            "bomb",
            "tag",
            "latin1",
            "deep-flow",
            "twice",
            "nul",
            "large",
        ):
            content, words = YAML[kind]
            yield Case(f"{name}-{kind}", written(name, content), words, 2)
    yield Case("suite-missing", lambda p: p.recipe("suite.yaml", "absent.yaml"), "absent.yaml", 2)
    yield Case("prompts-missing", lambda p: (p.folder / "prompts.yaml").unlink(), "prompts", 2)


def names() -> Iterator[Case]:
    """Names of files that would do something where they are printed."""
    names = {"escape": "a\x1b]0;owned\x07", "newline": "a\nerror: b", "markup": "[red]x[foo]",
             "bidi": "a\u202eb", "template": "{{ 7 * 7 }}", "option": "--force"}  # fmt: skip
    for kind, name in names.items():

        def spoil(place: Place, name: str = name) -> None:
            place.model.rename(place.folder / name)
            (place.folder / name / "config.json").unlink()
            quoted = json.dumps(name)
            place.recipe("source: model", f"source: {quoted}")

        # YAML itself refuses the escape character; a path refuses what cannot be shown.
        code = 2 if kind == "escape" else 3
        words = {"escape": "U+001B", "newline": "control char", "bidi": "control char"}
        yield Case(f"folder-{kind}", spoil, words.get(kind, "config.json"), code)
