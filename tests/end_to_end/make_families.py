"""Tiny models of every family in quantize/architectures.py, saved by transformers itself.

Runs in the llmcompressor environment: `python make_families.py FOLDER VOCABULARY`. Each subfolder
is a checkpoint without a tokenizer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-one-layer": ("llama", {"num_hidden_layers": 1}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen2_moe-no-bias": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 24, "qkv_bias": False},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 16}),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        EXPERTS | {"head_dim": 16, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "qwen3_moe-every-second": ("qwen3_moe", EXPERTS | {"head_dim": 16, "decoder_sparse_step": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "olmoe": ("olmoe", {"num_experts": 3, "num_experts_per_tok": 1}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16}),
    "gemma3-untied": ("gemma3_text", {"head_dim": 16, "tie_word_embeddings": False}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False}),
}


def main(folder: Path, vocabulary: int) -> None:
    """Save every family in BF16; one in FP32, one in FP16 and in many shards."""
    for name, (kind, options) in FAMILIES.items():
        config = AutoConfig.for_model(kind, **(SIZES | options), vocab_size=vocabulary)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=vocabulary)
    for name, dtype, shard in (
        ("llama-fp32", torch.float32, "5GB"),
        ("llama-fp16-sharded", torch.float16, "40KB"),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder / name, max_shard_size=shard)
    unknown = AutoConfig.for_model("helium", **SIZES, head_dim=8, vocab_size=vocabulary)
    AutoModelForCausalLM.from_config(unknown).save_pretrained(folder / "not-in-the-table")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
