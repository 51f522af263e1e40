"""Llama 3.1 70B from its published config: shapes alone, as in meta-llama/Llama-3.1-70B."""

from pathlib import Path
from typing import Any

from quantize.capacity.from_config import tensors_of
from quantize.checkpoint import Checkpoint
from quantize.recipe import Recipe
from quantize.recipe_file import load_recipe
from quantize.resources import shipped_root

CONFIG: dict[str, Any] = {  # https://huggingface.co/meta-llama/Llama-3.1-70B, config.json
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

STAGES = [
    ("fetch", "fetch"),
    ("calibrate", "calibrate"),
    ("compress", "compress"),
    ("measure-baseline", "measure"),
    ("measure-candidate", "measure"),
]
KINDS = {kind for _, kind in STAGES}


def checkpoint(**changes: Any) -> Checkpoint:
    config = CONFIG | changes
    tensors = tensors_of(config)
    assert tensors is not None
    return Checkpoint(Path("not-here"), config, tensors, ())


def recipe(*changes: str, name: str = "llama3-70b-awq") -> Recipe:
    return load_recipe(shipped_root() / "recipes" / f"{name}.yaml", changes)
