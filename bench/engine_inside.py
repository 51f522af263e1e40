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
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEP = WIDE | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
STEPS, ROWS, LENGTH, RATE = 250, 8, 128, 6e-4
SAMPLES, SAMPLE_TOKENS = 64, 512
"""Calibration sequences of the wide models, each full."""
DEEP_SAMPLES, DEEP_TOKENS = 16, 256
TINY_SAMPLES, TINY_TOKENS = 128, 256
"""As in the shipped recipes; rows are shorter than that."""


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
    ids = engine_models.sequences("train", STEPS * ROWS, LENGTH, SEED)
    loss = engine_models.train(model, ids.view(STEPS, ROWS, LENGTH), RATE)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    engine_models.save(model, folder / "plain")
    engine_models.put_outliers(model)
    engine_models.save(model, folder / "outliers")
    (folder / "trained.json").write_text(json.dumps({"steps": STEPS, "loss": loss}))


def deep(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.end_to_end import engine_models

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**(DEEP | {"num_hidden_layers": layers})))
    engine_models.save(model, folder)


def tokens(model: Path, file: Path, seed: int) -> None:
    """A calibrate stage's tokens.npz for that model."""
    import numpy as np

    from tests.end_to_end import engine_models

    width = json.loads((model / "config.json").read_text())["hidden_size"]
    if width == WIDE["hidden_size"]:
        rows = engine_models.sequences("calibration", SAMPLES, SAMPLE_TOKENS, seed).tolist()
    elif width == DEEP["hidden_size"]:
        rows = engine_models.sequences("calibration", DEEP_SAMPLES, DEEP_TOKENS, seed).tolist()
    else:
        rows = [row[:TINY_TOKENS] for row in Random(seed).sample(shipped_rows(model), TINY_SAMPLES)]
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
    """The shipped held-out documents one after another: token ids (sequences, TINY_TOKENS)."""
    import torch
    from transformers import AutoTokenizer

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
