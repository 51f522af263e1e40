"""Run in an engine's environment: its own reader's answers with a checkpoint in its format.

    python own_readers.py READER FOLDER QUESTION...

Prints a JSON line for each question: `ids` of the greedy answer, and `best`, the highest
log-probability behind each token of the prompt. transformers reads compressed-tensors.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoTokenizer


def by_autoawq(folder: str) -> Any:
    from awq import AutoAWQForCausalLM
    from awq.models import base
    from awq.modules.linear import gemm

    # Without a GPU it asks for a kernel that is not on PyPI any more; it has one in plain torch.
    base.get_best_device = lambda: "none"
    gemm.TRITON_AVAILABLE = False
    placed = {"": "cpu"}
    return AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, device_map=placed).model


def by_gptqmodel(folder: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model


def by_transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


READERS = {"autoawq": by_autoawq, "gptqmodel": by_gptqmodel, "transformers": by_transformers}


def main() -> None:
    reader, folder, *questions = sys.argv[1:]
    model, tokenizer = READERS[reader](folder), AutoTokenizer.from_pretrained(folder)
    for question in questions:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            best = model(ids).logits[0].float().log_softmax(-1).amax(-1)
            mask = torch.ones_like(ids)
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False
            )
        answer = made[0][ids.shape[1] :].tolist()
        print(json.dumps({"ids": answer, "best": best.tolist()}))


main()
