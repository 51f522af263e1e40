"""The part of bench/engine.py that runs in the llmcompressor environment: models, tokens, KL.

engine_inside.py wide FOLDER          a Llama of 4 layers of width 1024, plain/ and outliers/
engine_inside.py deep FOLDER LAYERS   a random one of width 512
engine_inside.py tokens MODEL FILE SEED   a calibration set
engine_inside.py run ENGINE REQUEST RESULT   a worker, with the CPU time behind its imports
engine_inside.py measure BASELINE CANDIDATE ...   JSON
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEED = 3
WIDE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
DEEP = WIDE | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
STEPS, ROWS, LENGTH = 120, 8, 128
SAMPLES, SAMPLE_TOKENS = 64, 512
"""Calibration sequences of the wide models: of bytes, each full."""
DEEP_SAMPLES, DEEP_TOKENS = 16, 256
TINY_SAMPLES, TINY_TOKENS = 128, 256
"""As in the shipped recipes; rows are shorter than that."""
HELD_OUT_TOKENS = 24576


def main() -> None:
    command, arguments = sys.argv[1], sys.argv[2:]
    match command:
        case "wide":
            wide(Path(arguments[0]))
        case "deep":
            deep(Path(arguments[0]), int(arguments[1]))
        case "tokens":
            tokens(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
        case "run":
            run(*arguments)
        case "measure":
            measure(Path(arguments[0]), [Path(name) for name in arguments[1:]])
        case other:
            raise SystemExit(f"unknown command {other}")


def run(engine: str, request: str, result: str) -> None:
    from quantize.protocol import Events, load_request

    worker = importlib.import_module(f"quantize.workers.{engine}")
    job = load_request(request)
    before = cpu_seconds()
    worker.run(job, Events(job.events))
    Path(result).write_text(json.dumps({"cpu_seconds": cpu_seconds() - before}))
    sys.stdout.flush()
    os._exit(0)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def wide(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.end_to_end import engine_models

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**WIDE))
    ids = byte_sequences("train", STEPS * ROWS, LENGTH, SEED)
    loss = engine_models.train(model, ids.view(STEPS, ROWS, LENGTH), 1e-3)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder / "plain")
    engine_models.put_outliers(model)
    model.save_pretrained(folder / "outliers")
    (folder / "trained.json").write_text(json.dumps({"steps": STEPS, "loss": loss}))


def deep(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**(DEEP | {"num_hidden_layers": layers}))).save_pretrained(folder)


def byte_sequences(split: str, count: int, length: int, seed: int) -> Any:
    """Token ids (count, length): the bytes of documents, each after a token of its own."""
    import torch

    from tests.end_to_end import engine_models

    stream: list[int] = []
    source = engine_models.texts(split, seed)
    while len(stream) < count * length:
        stream += [WIDE["bos_token_id"], *next(source).encode()]
    return torch.tensor(stream[: count * length]).view(count, length)


def tokens(model: Path, file: Path, seed: int) -> None:
    """A calibrate stage's tokens.npz for that model."""
    import numpy as np

    if (model / "tokenizer.json").exists():
        rows = [row[:TINY_TOKENS] for row in Random(seed).sample(shipped_rows(model), TINY_SAMPLES)]
    else:
        is_wide = json.loads((model / "config.json").read_text())["hidden_size"] == 1024
        count, length = (SAMPLES, SAMPLE_TOKENS) if is_wide else (DEEP_SAMPLES, DEEP_TOKENS)
        rows = byte_sequences("calibration", count, length, seed).tolist()
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    np.savez(file, ids=np.concatenate(rows).astype(np.int32), offsets=offsets)


def shipped_rows(model: Path) -> list[list[int]]:
    """The shipped calibration set through the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for line in (ROOT / "examples/tiny_llama/calibration.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "text" in row:
            rows.append(tokenizer(row["text"])["input_ids"])
        else:
            chat = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            rows.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return rows


def held_out(model: Path) -> Any:
    """Token ids (sequences, tokens) that no model was trained or calibrated on."""
    import torch
    from transformers import AutoTokenizer

    if not (model / "tokenizer.json").exists():
        return byte_sequences("held_out", HELD_OUT_TOKENS // SAMPLE_TOKENS, SAMPLE_TOKENS, SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (ROOT / "eval/texts/valley.jsonl").read_text().splitlines()
    stream = [i for line in lines for i in tokenizer(json.loads(line)["text"])["input_ids"]]
    count = len(stream) // TINY_TOKENS
    return torch.tensor(stream[: count * TINY_TOKENS]).view(count, TINY_TOKENS)


def measure(model: Path, candidates: list[Path]) -> None:
    from tests.end_to_end import engine_kl

    against = engine_kl.baseline(model, held_out(model))
    measured = {str(model): against.measured} | {
        str(folder): engine_kl.measure(folder, against) for folder in candidates
    }
    print(json.dumps({name: asdict(one) for name, one in measured.items()}))


main()
