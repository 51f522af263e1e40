"""GPTQModel on the calibrate stage's token ids: one pass over every sequence, as it is.

Runs in the gptqmodel environment.

Request body: that of `workers.oneshot`. Result body: `quantized` (module names), `seconds`,
`peak_memory_bytes`, `versions`; `peak_device_bytes` on a GPU.

What the recipe's keys are called here: scheme W4A16 is `bits` 4 and `sym`, W4A16_ASYM is not `sym`,
W8A16 is `bits` 8; `activation_order` static is `act_group_aware` (columns are permuted so that
groups stay where they are), none is neither that nor `desc_act`; `dampening` is `damp_percent`.
Where the dampened Hessian has no Cholesky factor GPTQModel raises the dampening by itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

LOADERS = 2
"""Threads that its loader takes out of the pool, which must have as many (`gptqmodel/__init__.py`);
on two processors and fewer it would make one."""

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(LOADERS, (os.cpu_count() or 1) // 2)))

import torch  # noqa: E402  (the pool is as large as its variable says at the import)
from gptqmodel import GPTQModel  # noqa: E402
from gptqmodel.quantization.config import GPTQConfig  # noqa: E402

from quantize.engine.memory import peaks  # noqa: E402
from quantize.protocol import Events, Request, WorkerError, worker_main  # noqa: E402
from quantize.workers.own_format import (  # noqa: E402
    finish,
    ignored,
    tensor_names,
    token_rows,
)

SHARD_SIZE = "5GB"
BITS = {"W4A16": 4, "W4A16_ASYM": 4, "W8A16": 8}
CHANNEL = -1


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load in BF16, quantize, save in the gptq format."""
    body = request.body
    started = time.monotonic()
    events.progress("loading the checkpoint", 0, 1)
    model = _load(body, Path(request.work) / "offload")
    os.chdir(request.work)  # it writes a folder of logs to wherever it runs
    layers = model.model.config.num_hidden_layers

    def after(layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            events.progress("quantizing", layer_idx + 1, layers, "layers")

    model.layer_callback = after
    _take_every_row(model)
    events.progress("quantizing", 0, layers, "layers")
    rows = token_rows(body["tokens"])
    model.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows],
        calibration_sort=None,
        batch_size=1,
    )
    events.progress("quantizing", layers, layers, "layers")
    events.progress("saving the checkpoint", 0, 1)
    output = Path(body["output"])
    model.save(str(output), max_shard_size=SHARD_SIZE)
    saved = json.loads((output / "config.json").read_text(encoding="utf-8"))
    saved["quantization_config"]["meta"].pop("offload_to_disk_path", None)  # of this machine
    return {
        "quantized": finish(body, saved["quantization_config"], "GPTQModel"),
        "seconds": time.monotonic() - started,
        **peaks(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("gptqmodel", "torch", "transformers")
        },
    }


def _load(body: dict[str, Any], offload: Path) -> Any:
    """The model with its config; finished layers are offloaded to a folder that begins empty."""
    shutil.rmtree(offload, ignore_errors=True)
    offload.mkdir(parents=True)
    modules = [name.removesuffix(".weight") for name in sorted(tensor_names(Path(body["model"])))]
    left_out: dict[str, dict[str, Any]] = {
        f"-:^{re.escape(name)}$": {} for name in ignored(modules, body["ignore"])
    }
    config = GPTQConfig(
        bits=BITS[body["scheme"]],
        sym=body["scheme"] != "W4A16_ASYM",
        group_size=CHANNEL if body["group_size"] == "channel" else body["group_size"],
        desc_act=False,
        act_group_aware=body["activation_order"] == "static",
        damp_percent=body["dampening"],
        dynamic=left_out or None,
        offload_to_disk=True,
        offload_to_disk_path=str(offload),
        device=None if torch.cuda.is_available() else "cpu",
        # Its faster packing is compiled on first use: half a minute with a compiler, none without.
        pack_impl="original",
    )
    return GPTQModel.load(body["model"], config, trust_remote_code=False, dtype=torch.bfloat16)


def _take_every_row(model: Any) -> None:
    """Sequences of ten tokens and fewer are left out by default; the others engines see them."""
    prepare = model.prepare_dataset

    def every(**arguments: Any) -> Any:
        prepared = prepare(**arguments, calibration_data_min_length=0)
        if len(prepared) != len(arguments["calibration_dataset"]):
            raise WorkerError("ToolError", "GPTQModel left out calibration sequences")
        return prepared

    model.prepare_dataset = every


if __name__ == "__main__":
    worker_main(run)
