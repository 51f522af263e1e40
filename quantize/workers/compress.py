"""llm-compressor's `oneshot` on the calibrate stage's token ids.

Runs in the llmcompressor environment.

Request body: `model` (source folder), `output` (folder that receives the checkpoint), `tokens`
(`tokens.npz` or null), `method`, `scheme`, `group_size` (or null), `ignore`, `dampening`,
`activation_order`, `copy` (names of files taken over from the source as they are).
Result body: `quantized` (module names), `seconds`, `peak_memory_bytes`, `versions`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

from quantize.protocol import Events, Request, worker_main

SHARD_SIZE = "5GB"


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load in BF16, quantize, save in the compressed-tensors format."""
    body = request.body
    started = time.monotonic()
    _report_progress(events)
    if not torch.cuda.is_available():
        _without_pinned_memory()
    events.progress("loading the checkpoint", 0, 1)
    model = AutoModelForCausalLM.from_pretrained(
        body["model"], dtype=torch.bfloat16, local_files_only=True
    )
    modifiers = _modifiers(body)
    arguments: dict[str, Any] = {"model": model, "recipe": modifiers}
    if body["tokens"]:
        loader, longest = _loader(Path(body["tokens"]))
        arguments |= {"dataset": loader, "num_calibration_samples": len(loader)}
        arguments |= {"max_seq_length": longest, "shuffle_calibration_samples": False}
    oneshot(**arguments)
    quantized = sorted(
        name
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    )
    output = Path(body["output"])
    events.progress("saving the checkpoint", 0, 1)
    model.save_pretrained(output, save_compressed=True, max_shard_size=SHARD_SIZE)
    for name in body["copy"]:
        shutil.copyfile(Path(body["model"], name), output / name)
    return {
        "quantized": quantized,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
    }


def _modifiers(body: dict[str, Any]) -> list[Any]:
    groups = {"group_0": _scheme(body["scheme"], body["group_size"])}
    common = {"config_groups": groups, "ignore": list(body["ignore"])}
    order = None if body["activation_order"] == "none" else body["activation_order"]
    gptq = {"dampening_frac": body["dampening"], "actorder": order}
    match body["method"]:
        case "awq":
            return [AWQModifier(), QuantizationModifier(**common)]
        case "awq+gptq":
            return [AWQModifier(), GPTQModifier(**common, **gptq)]
        case "gptq" | "int8":
            return [GPTQModifier(**common, **gptq)]
        case "rtn" | "fp8":
            return [QuantizationModifier(**common)]
        case other:
            raise ValueError(f"unknown method {other}")


def _scheme(name: str, group_size: int | None) -> QuantizationScheme:
    scheme = preset_name_to_scheme(name, ["Linear"])
    if group_size is not None:
        scheme.weights.group_size = group_size
    return scheme


def _loader(path: Path) -> tuple[torch.utils.data.DataLoader[Any], int]:
    """Batches of one sequence, input_ids (1, tokens) int64, and the longest sequence's length."""
    arrays = np.load(path)
    ids, offsets = arrays["ids"].astype(np.int64), arrays["offsets"]
    rows = [torch.from_numpy(ids[a:b]) for a, b in itertools.pairwise(offsets)]

    def collate(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        stacked = torch.stack(batch)
        return {"input_ids": stacked, "attention_mask": torch.ones_like(stacked)}

    return (
        torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=collate),
        int(np.diff(offsets).max()),
    )


def _without_pinned_memory() -> None:
    """llm-compressor 0.14 pins its activation cache without asking for an accelerator."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def _report_progress(events: Events) -> None:
    """Turn llm-compressor's progress bars into events."""

    class EventBar(tqdm.tqdm):  # type: ignore[misc]
        """A bar that also says where it is, and at which layer."""

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            self._say()
            return shown

        def __iter__(self) -> Any:
            for item in super().__iter__():
                yield item
                self._say()

        def _say(self) -> None:
            if time.monotonic() - getattr(self, "_said", 0.0) < 0.2:
                return
            self._said = time.monotonic()
            layer = re.match(r"\((\d+)/(\d+)\): (\w+)", self.desc or "")
            if layer:
                at, count, verb = int(layer[1]), int(layer[2]), layer[3].lower()
                share = self.n / self.total if self.total else 0.0
                half = 0.0 if verb == "calibrating" else 0.5
                events.progress("layers", round(at - 1 + half + share / 2, 2), count, "layers")
            elif self.total:
                events.progress(self.desc or "quantizing", self.n, self.total)

    for name in ("pipelines.sequential.pipeline", "pipelines.basic.pipeline"):
        module = importlib.import_module(f"llmcompressor.{name}")
        module.tqdm = EventBar  # type: ignore[attr-defined]
    awq = sys.modules["llmcompressor.modifiers.transform.awq.base"]
    awq.tqdm = EventBar  # type: ignore[attr-defined]


if __name__ == "__main__":
    worker_main(run)
