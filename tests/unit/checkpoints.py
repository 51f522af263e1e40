"""Tiny real checkpoints: a Llama in BF16, and the same quantized to nearest, both in numpy.

The writers here know the formats by their specifications; nothing is shared with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantize.recipe import Quantize, Recipe

Tensors = dict[str, tuple[str, np.ndarray]]  # name → safetensors dtype, values or bits

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 128, 256, 4, 2, 96
GROUP = 32
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def safetensors_bytes(tensors: Tensors, edit: Callable[[dict[str, Any]], None] | None = None):
    """A file's bytes; `edit` may spoil the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, position = [], 0
    for name, (dtype, values) in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        offsets = [position, position + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data.append(raw)
        position += len(raw)
    if edit is not None:
        edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of BF16 by truncation."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def llama_tensors(*, layers: int = 2, tied: bool = False, seed: int = 0, hidden: int = HIDDEN):
    generator = np.random.default_rng(seed)

    def weight(*shape: int) -> tuple[str, np.ndarray]:
        return "BF16", bf16(generator.normal(0, 0.02, shape))

    def norm() -> tuple[str, np.ndarray]:
        return "BF16", bf16(generator.uniform(0.5, 1.5, hidden))

    kv = hidden // HEADS * KV_HEADS
    tensors: Tensors = {"model.embed_tokens.weight": weight(VOCABULARY, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors[name + "input_layernorm.weight"] = norm()
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            tensors[f"{name}self_attn.{part}_proj.weight"] = weight(rows, hidden)
        tensors[name + "post_attention_layernorm.weight"] = norm()
        for part in ("gate", "up"):
            tensors[f"{name}mlp.{part}_proj.weight"] = weight(INTERMEDIATE, hidden)
        tensors[name + "mlp.down_proj.weight"] = weight(hidden, INTERMEDIATE)
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = weight(VOCABULARY, hidden)
    return tensors


def llama_config(*, layers: int = 2, tied: bool = False, hidden: int = HIDDEN) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }


def write_checkpoint(
    folder: Path,
    tensors: Tensors | None = None,
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
    template: str | None = TEMPLATE,
) -> Path:
    """A checkpoint folder that transformers could load; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else tensors
    write_weights(folder, tensors, shards)
    write_json(folder / "config.json", llama_config() if config is None else config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "temperature": 0.7})
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}})
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    if template is not None:
        tokenizer_config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x07sentencepiece")
    return folder


def write_weights(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names = list(tensors)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        (folder / file).write_bytes(safetensors_bytes(part))
        index |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def recipe(source: str = "checkpoint", **blocks: Any) -> Recipe:
    given: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": source},
        "calibration": {"source": "calibration.jsonl", "sequence_length": 128},
        "quantize": {"method": "awq", "group_size": GROUP},
    }
    return Recipe.model_validate_json(json.dumps(given | blocks))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers (n, m) into int32 words (n, ceil(m * bits / 32)), the first lowest."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for place, value in enumerate(row[start : start + per_word]):
                word |= (value + (1 << (bits - 1))) << (place * bits)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return np.array(rows, "<i4")


def quantized_tensors(tensors: Tensors, quantize: Quantize) -> Tensors:
    """Every linear of the layers, rounded to nearest; the rest as it is."""
    result: Tensors = {}
    for name, (dtype, bits) in tensors.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            parts = _quantized(floats(bits), quantize)
            result |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            result[name] = (dtype, bits)
    return result


def _quantized(weight: np.ndarray, quantize: Quantize) -> Tensors:
    scheme = quantize.effective_scheme
    rows, columns = weight.shape
    if scheme in ("W4A16", "W4A16_ASYM", "W8A16"):
        bits = 8 if scheme == "W8A16" else 4
        group = quantize.effective_group_size or 128
        groups = weight.reshape(rows, columns // group, group)
        top = (1 << (bits - 1)) - 1
        if scheme == "W4A16_ASYM":
            low, high = groups.min(-1), groups.max(-1)
            scale = bf16((high - low) / 15 * 1.01)
            zero = np.clip(np.round(-8 - low / floats(scale)), -8, 7).astype(int)
        else:
            scale = bf16(np.abs(groups).max(-1) / top * 1.01)
            zero = np.zeros(scale.shape, int)
        q = np.round(groups / floats(scale)[..., None]) + zero[..., None]
        q = np.clip(q, -top - 1, top).astype(int).reshape(rows, columns)
        parts: Tensors = {
            "weight_packed": ("I32", pack(q, bits)),
            "weight_scale": ("BF16", scale),
            "weight_shape": ("I64", np.array([rows, columns], "<i8")),
        }
        if scheme == "W4A16_ASYM":
            parts["weight_zero_point"] = ("I32", pack(zero.T, bits).T)
        return parts
    if scheme == "W8A8":
        scale = bf16(np.abs(weight).max(1, keepdims=True) / 127 * 1.01)
        q = np.clip(np.round(weight / floats(scale)), -128, 127).astype("i1")
        return {"weight": ("I8", q), "weight_scale": ("BF16", scale)}
    return _fp8(weight, scheme)


def _fp8(weight: np.ndarray, scheme: str) -> Tensors:
    rows, columns = weight.shape
    if scheme == "FP8_BLOCK":
        blocks = weight.reshape(-(-rows // 64) // 2 or 1, -1, columns // 128, 128)
        scale = bf16(np.abs(blocks).max((1, 3)) / 448 * 1.01)
        spread = np.repeat(np.repeat(floats(scale), 128, 0)[:rows], 128, 1)
    elif scheme == "FP8":
        scale = bf16(np.abs(weight).max(keepdims=True).reshape(1) / 448 * 1.01)
        spread = floats(scale)
    else:
        scale = bf16(np.abs(weight).max(1, keepdims=True) / 448 * 1.01)
        spread = floats(scale)
    parts: Tensors = {"weight": ("F8_E4M3", e4m3(weight / spread)), "weight_scale": ("BF16", scale)}
    if scheme == "FP8":
        parts["input_scale"] = ("BF16", bf16(np.array([0.05])))
    return parts


def e4m3(values: np.ndarray) -> np.ndarray:
    """Bits of FP8 E4M3 by truncation of the magnitude: S.eeee.mmm, bias 7."""
    magnitude = np.abs(values).astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**-9)))
    exponent = np.clip(exponent, -6, 8)
    steps = np.floor(magnitude / 2.0 ** (exponent - 3)).astype(int)  # 8..15 when normal
    normal = steps >= 8
    biased = np.where(normal, exponent + 7, 0).astype(int)
    bits = (biased << 3) | np.where(normal, steps - 8, steps)
    return (bits | np.where(values < 0, 0x80, 0)).astype("u1")


def quantization_config(quantize: Quantize) -> dict[str, Any]:
    """As compressed-tensors 0.19 writes it."""
    scheme = quantize.effective_scheme
    names = {"W4A16": 4, "W4A16_ASYM": 4}
    packed = scheme.endswith(("A16", "ASYM"))
    strategy = {"FP8": "tensor", "FP8_BLOCK": "block"}.get(scheme, "channel")
    group = (quantize.effective_group_size or 128) if packed else None
    form = "pack" if packed else "int" if scheme == "W8A8" else "float"
    activations = None if packed else {"dynamic": scheme != "FP8", "num_bits": 8}
    weights = {
        "num_bits": names.get(scheme, 8),
        "type": "float" if form == "float" else "int",
        "strategy": "group" if packed else strategy,
        "symmetric": scheme != "W4A16_ASYM",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{form}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
    }


def write_quantized(folder: Path, tensors: Tensors, quantize: Quantize) -> Path:
    """What the compress stage makes of :func:`write_checkpoint` of the same tensors."""
    config = llama_config() | {"quantization_config": quantization_config(quantize)}
    return write_checkpoint(folder, quantized_tensors(tensors, quantize), config)


def edit_json(path: Path, change: Mapping[str, Any]) -> None:
    """Set top-level keys; None removes one."""
    value = json.loads(path.read_text()) | change
    write_json(path, {key: item for key, item in value.items() if item is not None})
