"""AutoAWQ on the calibrate stage's token ids.

Runs in the autoawq environment.

Request body: that of `workers.oneshot`. Result body: `quantized` (module names), `rows` and
`row_tokens` (how the token ids were cut), `seconds`, `peak_memory_bytes`, `versions`;
`peak_device_bytes` on a GPU.

AutoAWQ joins the sequences that it is given end to end and cuts them into rows of one length
(`awq/utils/calib_data.py`); the rest at the end, shorter than a row, is left out. A row here is as
long as the longest sequence, so that every token id which the other engines see is in, but for that
rest, in the same order; what differs is that a row may hold the end of one sequence and the
beginning of the next.

On a CPU the model is computed in FP32, of the same BF16 weights: most processors emulate BF16, and
then the search takes many times as long. What is not packed is saved in BF16 all the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from awq.models._config import AwqConfig
from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
from awq.quantize import quantizer as awq_quantizer
from awq.utils.module import get_named_linears
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig

from quantize.engine.config4 import for_transformers_4
from quantize.engine.memory import peaks
from quantize.protocol import Events, Request, worker_main
from quantize.workers.loading import load_model
from quantize.workers.own_format import finish, ignored, token_rows

SHARD_SIZE = "5GB"
BITS = 4
TOKENS_AT_ONCE = 16_384
"""Calibration tokens that run through a layer together. By default all of them do, and what the
layer computes is then kept for all of them at once."""


def run(request: Request, events: Events) -> dict[str, Any]:
    """Load, quantize, save in AutoAWQ's gemm format."""
    body = request.body
    started = time.monotonic()
    events.progress("loading the checkpoint", 0, 1)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = _config(Path(body["model"]))
    model = load_model(body["model"], dtype, config=config).eval()
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    left_out = ignored(linears, body["ignore"])
    _report_progress(events)
    _leave_out({model.get_submodule(name) for name in left_out})
    rows = token_rows(body["tokens"])
    longest = max(map(len, rows))
    kind = config.model_type
    engine = AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, config, AwqConfig(), None)
    engine.quantize(
        quant_config={
            "zero_point": True,
            "q_group_size": body["group_size"],
            "w_bit": BITS,
            "version": "gemm",
            "modules_to_not_convert": left_out or None,
        },
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=longest,
        n_parallel_calib_samples=max(1, TOKENS_AT_ONCE // longest),
        quantizer_cls=_Quantizer,
    )
    events.progress("saving the checkpoint", 0, 1)
    _save(model, Path(body["output"]))
    return {
        "quantized": finish(body, engine.quant_config.to_transformers_dict(), "AutoAWQ"),
        "rows": sum(map(len, rows)) // longest,
        "row_tokens": longest,
        "seconds": time.monotonic() - started,
        **peaks(),
        "versions": {
            n: importlib.metadata.version(n) for n in ("autoawq", "torch", "transformers")
        },
    }


def _config(source: Path) -> Any:
    """The checkpoint's config as transformers 4.51 writes it; no cache of keys and values."""
    stated = for_transformers_4(json.loads((source / "config.json").read_text(encoding="utf-8")))
    return AutoConfig.for_model(stated.pop("model_type"), **stated | {"use_cache": False})


class _Quantizer(awq_quantizer.AwqQuantizer):  # type: ignore[misc]
    """AutoAWQ's, for ignored modules and for a CPU."""

    def _get_input_feat(self, layer: torch.nn.Module, named_linears: Any) -> Any:
        """Of all linears: an ignored one, too, takes part in the search for scales."""
        return super()._get_input_feat(layer, get_named_linears(layer))

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *others: Any
    ) -> Any:
        """The candidates of the search start from the same weights.

        It keeps them as `v.cpu()`, which on a CPU is the weight itself: each candidate's scales
        were multiplied onto those of all before it, and most weights came out as zeros.
        """
        state_dict = module2inspect.state_dict
        module2inspect.state_dict = lambda: {n: t.clone() for n, t in state_dict().items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *others)
        finally:
            del module2inspect.state_dict


def _leave_out(modules: set[torch.nn.Module]) -> None:
    """Neither clip nor pack these; AutoAWQ knows them by parts of their names within a layer."""

    def others(linears: Mapping[str, torch.nn.Module], _parts: Any) -> dict[str, torch.nn.Module]:
        return {name: linear for name, linear in linears.items() if linear not in modules}

    awq_quantizer.exclude_layers_to_not_quantize = others


def _report_progress(events: Events) -> None:
    """Its bar over the layers becomes events."""

    def layers(indices: Sequence[int], desc: str = "") -> Iterator[int]:
        for index in indices:
            events.progress("quantizing", index, len(indices), "layers")
            yield index
        events.progress("quantizing", len(indices), len(indices), "layers")

    awq_quantizer.tqdm = layers


def _save(model: torch.nn.Module, output: Path) -> None:
    """All that is FP32 because it was computed in it goes back to BF16; packed tensors are not."""
    state = {
        name: tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor
        for name, tensor in model.state_dict().items()
    }
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else None
    for name in tied or ():
        state.pop(name, None)
    save_torch_state_dict(state, str(output), max_shard_size=SHARD_SIZE)


if __name__ == "__main__":
    worker_main(run)
