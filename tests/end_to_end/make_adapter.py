"""Writes a random two-layer Llama with a tokenizer and a LoRA adapter for it: BASE ADAPTER TYPE."""

import sys
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh"]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def main(base: Path, adapter: Path, kind: str) -> None:
    """`kind`: lora, dora (a trained head beside it), ia3, or tokens (more than embeddings)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="20KB")
    tokenizer(WORDS).save_pretrained(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    if kind == "ia3":
        peft_config = IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    else:
        dora = kind == "dora"
        saved = ["lm_head"] if dora else None
        peft_config = LoraConfig(
            r=4, lora_alpha=10, target_modules=targets, use_dora=dora, modules_to_save=saved
        )
    adapted = get_peft_model(model, peft_config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
                print(name)
    adapted.save_pretrained(adapter)
    if kind == "tokens":
        tokenizer([*WORDS, "<extra>"]).save_pretrained(adapter)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
