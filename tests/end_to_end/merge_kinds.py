"""Makes adapters of many kinds for random two-layer Llamas and merges each: FOLDER.

`FOLDER/<kind>/{base,adapter,merged}`, and in `FOLDER/results.json` what the worker answered, or its
error. Kinds whose name begins with `sabotaged` spoil the merge on purpose.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantize.protocol import Events, Request, WorkerError, write_json
from quantize.workers import merge

WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
WHOLE = ["embed_tokens", "lm_head"]
TEMPLATE = "{% for m in messages %}a b {{ m['content'] }} c{% endfor %}"

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "patterns": {
        "rank_pattern": {"v_proj": 8, "layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "one_layer": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\..*(q|o)_proj"},
    "embedding": {"target_modules": ["q_proj", *WHOLE]},
    "tied_head": {"target_modules": ["q_proj", "lm_head"]},
    "tied_saved": {"modules_to_save": ["embed_tokens"]},
    "trained_tokens": {"trainable_token_indices": [3, 5]},
    "tied_trained_tokens": {"trainable_token_indices": [3, 5]},
    "added_tokens": {"modules_to_save": WHOLE},
    "tied_added_tokens": {"modules_to_save": WHOLE},
    "biased_all": {"bias": "all"},
    "biased_lora_only": {"bias": "lora_only"},
    "biased_lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "eva": {},
    "fp16": {},
    "fp32": {},
    "more_tokens": {},
    "incomplete": {},
    "strange": {},
    "sabotaged_scaling": {},
    "sabotaged_left_out": {},
    "sabotaged_transposed": {"target_modules": ["q_proj"]},
    "sabotaged_saved": {},
    "sabotaged_not_a_number": {},
}


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def make(folder: Path, kind: str, options: dict[str, Any]) -> None:
    """A base in BF16 (or what the kind says) and an adapter with random values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=kind.startswith("biased"),
        tie_word_embeddings="tied" in kind,
        initializer_range=0.2,
    )
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(kind, torch.bfloat16)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    tokenizer(WORDS).save_pretrained(folder / "base")
    words = WORDS
    if "added" in kind:
        words = [*WORDS, "<extra>", "<more>"]
        model.resize_token_embeddings(len(words))
    if kind == "more_tokens":
        words = [*WORDS, "<extra>"]
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=10, **{"target_modules": TARGETS} | options)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder / "adapter")
    tokenizer(words).save_pretrained(folder / "adapter")
    if kind == "eva":  # starting values that leave the base as it is do not matter
        _edit_config(folder / "adapter", init_lora_weights="eva")
    if kind in ("incomplete", "strange"):
        _edit_tensors(folder / "adapter", kind)


def _edit_config(folder: Path, **change: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _edit_tensors(folder: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensor = tensors.pop(name)
    if kind == "strange":
        tensors |= {name: tensor, name.replace("q_proj", "query"): tensor.clone()}
    save_file(tensors, path)


def spoil(kind: str) -> Callable[..., Any]:
    """A `_merge` with a bug in it."""
    sound = merge._merge

    def spoilt(model: Any, events: Events) -> int:
        layers = [m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A]
        for layer in layers[:1] if kind == "sabotaged_left_out" else layers:
            delta = layer.get_delta_weight("default")
            match kind:
                case "sabotaged_scaling":
                    layer.scaling["default"] *= 0.9
                case "sabotaged_left_out":
                    layer.scaling["default"] = 0.0
                case "sabotaged_transposed":
                    layer.get_delta_weight = lambda _, delta=delta: delta.T.contiguous()
        return sound(model, events)

    return spoilt


def run(folder: Path, kind: str) -> dict[str, Any]:
    make(folder, kind, KINDS[kind])
    body = {name: str(folder / name) for name in ("base", "adapter")}
    body |= {"tokenizer": str(folder / "adapter"), "output": str(folder / "merged")}
    request = Request("merge", body, str(folder), str(folder / "events"))
    sound = merge._merge, merge._reload
    if kind.startswith("sabotaged"):
        merge._merge = spoil(kind)
    if kind in ("sabotaged_saved", "sabotaged_not_a_number"):

        def reload(output: Path) -> Any:
            model = sound[1](output)
            value = float("nan") if "number" in kind else 0.0
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[3].fill_(value)
            return model

        merge._reload = reload
    try:
        return {"ok": True, "body": merge.run(request, Events(Path(request.events)))}
    except WorkerError as error:
        return {"ok": False, "kind": error.kind, "message": error.message, "hint": error.hint}
    finally:
        merge._merge, merge._reload = sound


if __name__ == "__main__":
    place, *only = sys.argv[1:]
    results = {kind: run(Path(place) / kind, kind) for kind in only or KINDS}
    write_json(Path(place) / "results.json", results)
