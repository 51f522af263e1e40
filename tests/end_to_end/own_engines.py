"""Runs inside an engine's environment: a tiny random model of each model type, quantized.

`python own_engines.py WORKER FOLDER TYPE...` writes FOLDER/told.json: type → number of quantized
modules, or the error's text.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantize.protocol import Events, Request

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama" / "instruct"

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
OLDER: dict[str, Any] = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 256,
    "rotary_dim": 16,
    "ffn_dim": 256,
    "word_embed_proj_dim": 128,
}
"""What models before Llama call the same."""


def main(worker: str, folder: Path, *kinds: str) -> None:
    run = importlib.import_module(f"quantize.workers.{worker}").run
    tokens = write_tokens(folder)
    told: dict[str, int | str] = {}
    for kind in kinds:
        source, output = folder / kind, folder / f"{kind}-out"
        output.mkdir()
        try:
            write_model(kind, source)
            body = {
                "model": str(source),
                "output": str(output),
                "tokens": str(tokens),
                "scheme": "W4A16_ASYM" if worker == "autoawq" else "W4A16",
                "group_size": 32,
                "ignore": ["lm_head"],
                "dampening": 0.01,
                "activation_order": "static",
                "copy": [],
            }
            request = Request(worker, body, str(folder / f"{kind}-work"), str(folder / "events"))
            told[kind] = len(run(request, Events(request.events))["quantized"])
        except Exception as error:
            told[kind] = f"{type(error).__name__}: {error}"
    (folder / "told.json").write_text(json.dumps(told))  # the engines write bars to both streams


def write_model(kind: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, **SIZES | (OLDER if kind in ("gpt2", "gptj", "opt") else {})
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for path in TOKENIZER.glob("*token*"):  # GPTQModel does not load a folder without one
        shutil.copyfile(path, folder / path.name)


def write_tokens(folder: Path) -> Path:
    """Sequences of several lengths, one so short that GPTQModel would leave it out by itself."""
    generator = np.random.default_rng(0)
    lengths = [8, *map(int, generator.integers(12, 65, 16))]
    ids = generator.integers(5, 250, sum(lengths)).astype(np.int32)
    path = folder / "tokens.npz"
    np.savez(path, ids=ids, offsets=np.cumsum([0, *lengths]).astype(np.int64))
    return path


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
