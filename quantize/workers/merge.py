"""Merges a LoRA adapter into its base, in BF16, with peft.

Runs in the llmcompressor environment, on the CPU. Each adapted weight is raised to FP32, the
adapter's delta is added there, and the sum is rounded to BF16 once; at any time one weight is in
FP32, so memory stays near the base's size.

Request body: `base`, `adapter` and `tokenizer` (folders; the last holds the tokenizer that will be
used), `output` (folder that receives config and weights).
Result body: `modules` (number of adapted modules), `versions`.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.protocol import Events, Request, WorkerError, worker_main

SHARD_SIZE = "5GB"


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load, merge, save."""
    body = request.body
    adapter = Path(body["adapter"])
    _check_adapter(adapter)
    events.progress("loading the base", 0, 1)
    base = AutoModelForCausalLM.from_pretrained(body["base"], dtype="auto", local_files_only=True)
    _check_tokenizer(Path(body["tokenizer"]), base.get_input_embeddings().num_embeddings)
    try:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=False, torch_device="cpu")
    except (RuntimeError, ValueError) as error:  # shapes or module names that the base lacks
        raise WorkerError(
            "SourceError",
            f"the adapter {adapter} does not fit the base {body['base']}: {error}",
            "name the base that the adapter was trained on in model.source",
        ) from error
    modules = _merge(model, events)
    merged = model.merge_and_unload()  # takes the wrappers off; every delta is in already
    merged.to(torch.bfloat16)
    events.progress("saving the merged checkpoint", 0, 1)
    merged.save_pretrained(body["output"], max_shard_size=SHARD_SIZE)
    return {
        "modules": modules,
        "versions": {
            name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")
        },
    }


def _check_adapter(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise WorkerError(
            "SourceError",
            f"the adapter {adapter} is of type {config.get('peft_type')}, not LORA",
            "merge it with the tool that trained it, and name the result in model.source",
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise WorkerError(
            "SourceError",
            f"the adapter {adapter} has no adapter_model.safetensors",
            "save it again with peft's save_pretrained, which writes safetensors",
        )


def _check_tokenizer(folder: Path, embeddings: int) -> None:
    """Every token must have a row in the base's embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    extra = sorted(token for token, number in tokenizer.get_vocab().items() if number >= embeddings)
    if extra:
        named = ", ".join(extra[:3]) + (", ..." if extra[3:] else "")
        raise WorkerError(
            "SourceError",
            f"the tokenizer in {folder} has {len(extra)} tokens ({named}) "
            f"beyond the base's {embeddings} embeddings",
            "resize the base's embeddings as in training, save it, and name it in model.source",
        )


def _merge(model: PeftModel, events: Events) -> int:
    """Add every delta to its weight in FP32 and round once; how many modules were adapted."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    if not layers:
        raise WorkerError("SourceError", "the adapter touches no module of the base", "")
    with torch.no_grad():
        for number, (name, layer) in enumerate(layers, 1):
            weight = layer.get_base_layer()
            weight.to(torch.float32)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # NaN or Inf in the sum
                raise WorkerError("SourceError", f"{name}: {error}", "train it again") from error
            weight.to(torch.bfloat16)
            events.progress("merging the adapter", number, len(layers), "modules")
    return len(layers)


if __name__ == "__main__":
    worker_main(run)
