"""Writing the checkpoints as folders that any transformers from 4.51 to 5.17 loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

END, EOS = 6, 2
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
RANK, ALPHA = 16, 32
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def write_json(path: Path, content: object) -> None:
    """Write JSON as the Hub's files have it: two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_config(model: LlamaForCausalLM, eos: int) -> dict[str, object]:
    """config.json in the words of transformers 4, which transformers 5 reads as well."""
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": EOS,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def save_model(model: LlamaForCausalLM, tokenizer: Path, folder: Path, eos: int) -> None:
    """Write weights, configurations and tokenizer of a full checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model_config(model, eos))
    generation = {"bos_token_id": 1, "eos_token_id": [END, EOS], "pad_token_id": EOS}
    write_json(folder / "generation_config.json", generation | {"do_sample": False})
    copy_tokenizer(tokenizer, folder)


def save_adapter(tensors: dict[str, torch.Tensor], tokenizer: Path, folder: Path) -> None:
    """Write a LoRA adapter in PEFT's format, with its base next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "../base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / "adapter_config.json", config)
    copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy every tokenizer file."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
