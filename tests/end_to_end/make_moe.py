"""Run in the llmcompressor environment: a random mixture of many experts, and few tokens for them.

    python make_moe.py FOLDER

Writes `FOLDER/model` (Qwen3-MoE, 2 layers, 24 experts, 1 a token) and `FOLDER/tokens.npz`: so few
tokens that some experts get none, and others all of theirs from one half of the sequences.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, LENGTHS = 512, (12, 12, 11, 11, 10, 10, 9, 9)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=24,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    np.savez(folder / "tokens.npz", ids=ids, offsets=offsets)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
