"""Merges a LoRA adapter into its base, in BF16, with peft, and checks what it saved.

Runs in the llmcompressor environment, on the CPU. Each adapted weight is raised to FP32, the
adapter's delta is added there, and the sum is rounded to BF16 once. The logits of the unmerged pair
are taken before, those of the merged checkpoint after it was saved and loaded again
(:mod:`quantize.workers.merge_check`).

Memory: the base as its files hold it, the adapter in FP32, and of one layer, or of the embedding or
head, another FP32 copy. The pair is gone before the merged checkpoint is loaded.

Request body: `base`, `adapter` and `tokenizer` (folders; the last holds the tokenizer that will be
used), `output` (folder that receives config and weights).
Result body: `modules` (number of adapted modules), `untied` (embedding and head have become two),
`merge_check` (see there; `tokens` says what was asked), `versions`.
"""

from __future__ import annotations

import gc
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.protocol import Events, Request, WorkerError, worker_main
from quantize.workers import merge_check
from quantize.workers.loading import load_model

SHARD_SIZE = "5GB"
WEIGHTS = "adapter_model.safetensors"
LOCAL = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""No download, no Python of the checkpoint's, no pickle, whatever the libraries' defaults are."""


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load, merge, save, compare."""
    body = request.body
    adapter, output = Path(body["adapter"]), Path(body["output"])
    config = _config(adapter)
    events.progress("loading the base", 0, 1)
    base = load_model(body["base"], "auto")
    known = base.get_input_embeddings().num_embeddings
    rows = _resize(base, adapter)
    _check_tokenizer(Path(body["tokenizer"]), rows)
    untied = _untie(base, config, adapter)
    model = _pair(base, config, adapter)
    events.progress("asking the unmerged pair", 0, 1)
    special = [*_trained_tokens(config), *range(known, rows)]
    ids, what = merge_check.check_tokens(Path(body["tokenizer"]), rows, special)
    asked = _ask_pair(model, ids)
    modules = _merge(model, events)
    merged = model.merge_and_unload()  # takes the wrappers off; every delta is in already
    merged.to(torch.bfloat16)
    events.progress("saving the merged checkpoint", 0, 1)
    merged.save_pretrained(output, max_shard_size=SHARD_SIZE)
    del base, model, merged
    gc.collect()
    events.progress("asking the merged checkpoint", 0, 1)
    found = merge_check.compare(*asked, merge_check.logits(_reload(output), ids))
    _require(found)
    return {
        "modules": modules,
        "untied": untied,
        "merge_check": found | {"sequences": len(ids), "tokens": what},
        "versions": {
            name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")
        },
    }


def _config(adapter: Path) -> LoraConfig:
    """The adapter's config; the starting values that it was trained from do not matter here."""
    config = LoraConfig.from_pretrained(str(adapter))
    config.init_lora_weights = True
    config.inference_mode = True
    return config


def _refused(message: str, hint: str = "") -> WorkerError:
    return WorkerError(
        "SourceError", message, hint or "name the base that the adapter was trained on"
    )


def _resize(base: nn.Module, adapter: Path) -> int:
    """Give the base the rows of tokens that the adapter adds, which it brings; how many it has."""
    rows: int = base.get_input_embeddings().num_embeddings
    ends = _ends(base)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            *_, module, part = name.replace(".base_layer.", ".").split(".")
            if module in ends and part == "weight":
                rows = max(rows, file.get_slice(name).get_shape()[0])
    if rows > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return rows


def _ends(base: nn.Module) -> set[str]:
    """What the embedding and the head are called: the last parts of their names."""
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    return {name.rpartition(".")[2] for name, module in base.named_modules() if module in both}


def _check_tokenizer(folder: Path, embeddings: int) -> None:
    """Every token must have a row in the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    extra = sorted(token for token, number in tokenizer.get_vocab().items() if number >= embeddings)
    if extra:
        named = ", ".join(extra[:3]) + (", ..." if extra[3:] else "")
        raise _refused(
            f"the tokenizer in {folder} has {len(extra)} tokens ({named}) "
            f"beyond the base's {embeddings} embeddings",
            "resize the base's embeddings as in training, save it, and name it in model.source",
        )


def _untie(base: nn.Module, config: LoraConfig, adapter: Path) -> bool:
    """Make two tensors of a tied embedding and head where the adapter changes one of them alone.

    In training peft adds to one module's output, or trains a copy of it, and the other keeps the
    base's weight; a delta that is merged into the shared tensor would change both.
    """
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    ends = _ends(base)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        parts = [name.split(".") for name in file.keys()]  # noqa: SIM118
    adapted = any(
        ends & set(part) and any(text.startswith("lora_") for text in part) for part in parts
    )
    if not adapted and not ends & set(config.modules_to_save or ()):
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    base.config.get_text_config().tie_word_embeddings = False
    base.tie_weights()  # reads the config: nothing is tied any more
    return True


def _pair(base: nn.Module, config: LoraConfig, adapter: Path) -> PeftModel:
    """The base with the adapter on it; every tensor of the file is in its place."""
    try:
        model = PeftModel(base, config)
        loaded = model.load_adapter(str(adapter), "default", torch_device="cpu")
    except (RuntimeError, ValueError) as error:  # shapes or module names that the base lacks
        raise _refused(f"the adapter {adapter} does not fit its base: {error}") from error
    for keys, fault in (
        (loaded.unexpected_keys, "has tensors that no module of the base takes"),
        (loaded.missing_keys, "has no tensors for modules that its config names"),
    ):
        if keys:
            raise _refused(f"the adapter {adapter} {fault}: {', '.join(sorted(keys)[:3])}")
    model.eval()
    return model


def _trained_tokens(config: LoraConfig) -> list[int]:
    indices = config.trainable_token_indices or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [int(number) for found in lists for number in found]


def _ask_pair(
    model: PeftModel, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the pair, of the pair with rounding errors, and of the base without the adapter."""
    pair = merge_check.logits(model, ids)
    rounded = merge_check.logits(model, ids, errors=True)
    with model.disable_adapter():
        return pair, rounded, merge_check.logits(model, ids)


def _merge(model: PeftModel, events: Events) -> int:
    """Add every delta to its weight in FP32 and round once; how many modules were adapted."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
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


def _reload(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **LOCAL)
    return model.eval()


def _require(found: dict[str, Any]) -> None:
    if not found["passed"]:
        raise WorkerError(
            "ToolError",
            "the merged checkpoint is not the function of base and adapter: its logits differ by "
            f"{found['logit_change']:.3g} (root mean square), rounding to BF16 explains "
            f"{found['tolerance']:.3g}, and the whole adapter changes them by "
            f"{found['logit_change_of_adapter']:.3g}",
            "nothing was kept: merge it with the tool that trained it, name the result in "
            "model.source, and report this",
        )


if __name__ == "__main__":
    worker_main(run)
