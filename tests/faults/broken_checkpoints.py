"""The small files of a checkpoint, what stands in their place, and what a source must not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.faults.place import (
    BAD_JSON,
    KINDS,
    Case,
    Spoil,
    replaced,
    with_adapter,
    written,
)
from tests.unit.checkpoints import llama_tensors, safetensors_bytes


def _config(**change: Any) -> Spoil:
    return lambda place: place.edit("model/config.json", **change)


def json_files() -> Iterator[Case]:
    for name in ("config", "tokenizer_config", "tokenizer", "generation_config"):
        for kind, (content, words) in BAD_JSON.items():
            spoil = written(f"model/{name}.json", content)
            yield Case(f"{name}-{kind}", spoil, words)
    yield Case("config-no-architecture", lambda p: p.edit("model/config.json", architectures=[]),
               "names no architecture")  # fmt: skip
    for kind, value in {"number": [1], "text": "A", "null": None}.items():
        spoil = _config(architectures=value)
        yield Case(f"config-architecture-{kind}", spoil, "names no architecture")
    yield Case("template-latin1", written("model/chat_template.jinja", b"\xe4"), "not UTF-8")
    yield Case("config-gone", lambda p: (p.model / "config.json").unlink(), "no config.json")
    yield Case("config-lfs", written("model/config.json", b"version https://git-lfs.x\n"),
               "git-lfs pointer")  # fmt: skip


def kinds_of_file() -> Iterator[Case]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    for name in (*names, "chat_template.jinja", "LICENSE"):
        for kind, make in KINDS.items():
            yield Case(f"{name}-{kind}",
                       lambda p, n=name, m=make: replaced(p, f"model/{n}", m), name)  # fmt: skip
    for kind in ("pipe", "folder", "socket", "link-device", "terabyte"):
        yield Case(f"rows-{kind}",
                   lambda p, m=KINDS[kind]: replaced(p, "rows.jsonl", m), "rows.jsonl")  # fmt: skip
        yield Case(f"held-out-{kind}",
                   lambda p, m=KINDS[kind]: replaced(p, "held-out.jsonl", m),
                   "held-out.jsonl")  # fmt: skip
    for kind in ("pipe", "folder", "socket", "link-device"):
        yield Case(f"recipe-{kind}", lambda p, m=KINDS[kind]: replaced(p, "recipe.yaml", m),
                   "recipe.yaml", 2)  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for kind in ("pipe", "link-outside", "link-device", "terabyte"):
            yield Case(f"{name}-{kind}", with_adapter(
                lambda p, n=name, m=KINDS[kind]: replaced(p, f"adapter/{n}", m)), name)  # fmt: skip


def quantized() -> Iterator[Case]:
    methods = ("awq", "gptq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors", "\x1b[31m")
    for method in methods:
        block = {"quant_method": method}
        yield Case(f"quantized-{method!a}",
                   lambda p, b=block: p.edit("model/config.json", quantization_config=b),
                   "already quantized")  # fmt: skip
    yield Case("quantized-compression", lambda p: p.edit("model/config.json",
               compression_config={}), "already quantized")  # fmt: skip
    yield Case("quantized-nested", lambda p: p.edit("model/config.json", text_config={
        "quantization_config": {"quant_method": "fp8"}}), "text_config.quantization")  # fmt: skip
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        yield Case(f"quantized-{name}", written(f"model/{name}", "{}"), name)
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": ("I32", np.zeros((4, 4), "<i4")),
        "model.layers.0.mlp.up_proj.weight.absmax": ("F32", np.zeros(4, "<f4")),
        "model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", np.zeros((1, 1), "<f4")),
        "model.layers.0.mlp.up_proj.weight_packed": ("I32", np.zeros((4, 4), "<i4")),
        "model.layers.0.mlp.up_proj_blocks": ("U8", np.zeros((4, 4), "u1")),
        "model.layers.0.mlp.up_proj.SCB": ("F32", np.zeros(4, "<f4")),
    }
    for name, tensor in tensors.items():
        content = safetensors_bytes(llama_tensors(layers=1) | {name: tensor})
        yield Case(f"quantized-{name.rpartition('.')[2]}",
                   written("model/model.safetensors", content), "already quantized")  # fmt: skip
    weights = llama_tensors(layers=1)
    weights["lm_head.weight"] = ("F8_E4M3", np.zeros((96, 128), "u1"))
    yield Case("quantized-fp8-weight", written("model/model.safetensors",
               safetensors_bytes(weights)), "lm_head.weight is F8_E4M3")  # fmt: skip


def code() -> Iterator[Case]:
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "processing_x.py"):
        code = "import pathlib; pathlib.Path('executed').touch()"
        yield Case(f"code-{name}", written(f"model/{name}", code), name)
    for name in ("config.json", "tokenizer_config.json"):
        for key in ("auto_map", "custom_pipelines"):
            yield Case(f"code-{key}-{name}", lambda p, n=name, k=key: p.edit(
                f"model/{n}", **{k: {"AutoModel": "x.Y"}}), f"{key} in {name}")  # fmt: skip


def cards() -> Iterator[Case]:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join([f'*{before}'] * 9)}]\n"
        for before, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    table = {
        "bomb": (bomb + "license: *i\n", "an alias"),
        "deep": ("a: " + "[" * 10_000 + "]" * 10_000, "not valid YAML"),
        "deep-65": ("a: " + "[" * 65 + "]" * 65, "nested more than"),
        "long": ("a: " + "x" * 300_000, "longer than"),
        "broken": ("license: [", "not valid YAML"),
        "key": ("? [a]\n: b", "not valid YAML"),
    }
    for kind, (text, words) in table.items():
        yield Case(f"card-{kind}", written("model/README.md", f"---\n{text}\n---\n"), words)
    yield Case("card-latin1", written("model/README.md", b"---\na: \xe4\n---\n"), "not UTF-8")
