"""llm-compressor's `oneshot` on the calibrate stage's token ids.

Runs in the llmcompressor environment.

Request body: `model` (source folder), `output` (folder that receives the checkpoint), `tokens`
(`tokens.npz` or null), `method`, `scheme`, `group_size` (an int, "channel" or null), `ignore`,
`overrides` (a list of `modules`, `scheme`, `group_size`), `kv_cache` ("fp8" or null), `dampening`,
`activation_order`, `copy` (names of files taken over from the source as they are).
Result body: `quantized` (module names), `seconds`, `peak_memory_bytes`, `versions`;
`peak_device_bytes` on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from llmcompressor import oneshot

from quantize.engine.memory import peaks
from quantize.engine.schemes import modifiers
from quantize.protocol import Events, Request, worker_main
from quantize.workers.loading import load_model

SHARD_SIZE = "5GB"
SAY_SECONDS = 0.25
MAPPINGS = 4
"""AWQ mappings of a decoder layer: before q/k/v, before o, before gate/up, before down."""


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load in BF16, quantize, save in the compressed-tensors format."""
    body = request.body
    started = time.monotonic()
    _report_progress(events)
    if not torch.cuda.is_available():
        _without_pinned_memory()
    events.progress("loading the checkpoint", 0, 1)
    model = load_model(body["model"], torch.bfloat16, code=body.get("trust_remote_code", False))
    arguments: dict[str, Any] = {"model": model, "recipe": modifiers(body, model)}
    if body.get("trust_remote_code", False):
        arguments["trust_remote_code_model"] = True  # it reads the config once more
    if body["tokens"]:
        loader, longest = _loader(Path(body["tokens"]))
        arguments |= {"dataset": loader, "num_calibration_samples": len(loader)}
        arguments |= {"max_seq_length": longest, "shuffle_calibration_samples": False}
    oneshot(**arguments)
    quantized = sorted(
        name
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
        and module.quantization_scheme.weights is not None  # not an attention's KV cache
    )
    output = Path(body["output"])
    events.progress("saving the checkpoint", 0, 1)
    model.save_pretrained(output, save_compressed=True, max_shard_size=SHARD_SIZE)
    for name in body["copy"]:
        shutil.copyfile(Path(body["model"], name), output / name)
    return {
        "quantized": quantized,
        "seconds": time.monotonic() - started,
        **peaks(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
    }


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


# Share of a layer's time after each phase: the calibration pass, AWQ's grid searches or GPTQ's
# column loops, and the second pass that hands the quantized layer's output on.
CALIBRATED, SEARCHED = 0.2, 0.9


def _report_progress(events: Events) -> None:
    """Turn llm-compressor's many progress bars into one: layers, with fractions."""
    layer = {"at": 1, "count": 1, "smoothed": 0.0}

    def say(bar: tqdm.tqdm) -> None:
        done, total = float(bar.n), float(bar.total or 1)
        share = 0.0
        if found := re.match(r"\((\d+)/(\d+)\): (\w+)", bar.desc or ""):
            layer.update(at=int(found[1]), count=int(found[2]))
            if found[3] == "Calibrating":
                share = CALIBRATED * done / total
            else:
                share = SEARCHED + (1 - SEARCHED) * done / total
        elif (bar.desc or "").startswith("Smoothing"):
            layer["smoothed"] = done / total
            share = CALIBRATED + (SEARCHED - CALIBRATED) * layer["smoothed"]
        elif (bar.desc or "").startswith("Grid search"):
            # one mapping of a layer; how many there are, only the bar around it knows
            part = layer["smoothed"] + (done / total) / MAPPINGS
            share = CALIBRATED + (SEARCHED - CALIBRATED) * min(part, 1.0)
        else:
            return
        # The last part is the head behind the layers.
        at, layers = layer["at"], max(layer["count"] - 1, 1)
        events.progress("quantizing", round(min(at - 1 + share, layers), 2), layers, "layers")

    class EventBar(tqdm.tqdm):  # type: ignore[misc]
        """A bar that also says where it is; the terminal and the log get the events instead."""

        said = 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with open(os.devnull, "w") as nothing:
                super().__init__(*args, **{**kwargs, "file": nothing, "mininterval": 1e9})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            self.say()
            return shown

        def __iter__(self) -> Any:
            for item in self.iterable:
                yield item
                self.n += 1
                self.say()

        def say(self) -> None:
            if time.monotonic() - EventBar.said >= SAY_SECONDS:
                EventBar.said = time.monotonic()
                say(self)

    for name in ("pipelines.sequential.pipeline", "pipelines.basic.pipeline"):
        module = importlib.import_module(f"llmcompressor.{name}")
        module.tqdm = EventBar  # type: ignore[attr-defined]
    awq = sys.modules["llmcompressor.modifiers.transform.awq.base"]
    awq.tqdm = EventBar  # type: ignore[attr-defined]


if __name__ == "__main__":
    worker_main(run)
