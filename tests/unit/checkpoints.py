"""Tiny real checkpoints: a Llama in BF16, and the same quantized to nearest, both in numpy.

The writers here know the formats by their specifications; nothing is shared with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantize.recipe import Recipe

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


def edit_json(path: Path, change: Mapping[str, Any]) -> None:
    """Set top-level keys; None removes one."""
    value = json.loads(path.read_text()) | change
    write_json(path, {key: item for key, item in value.items() if item is not None})
