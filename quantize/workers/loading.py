"""Loading a checkpoint whole or not at all: transformers fills what is missing at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from quantize.protocol import WorkerError

COMPUTED = (".rotary_emb.inv_freq", ".masked_bias")
"""Buffers that old checkpoints carry and every loader computes."""


DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
"""What the argument is called; 4.51, which AutoAWQ needs, does not know the newer name."""


def load_model(
    folder: str | Path, dtype: torch.dtype | str, *, code: bool = False, config: Any = None
) -> Any:
    """The checkpoint's model; a SourceError for a tensor too few, too many or of another shape.

    No download and no pickle, whatever the library's defaults are; Python of the checkpoint's only
    with `code`, which the recipe pins. `config`: instead of the folder's.
    """
    stated = {} if config is None else {"config": config}
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            **{DTYPE: dtype},
            **stated,
            local_files_only=True,
            trust_remote_code=code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise WorkerError(
            "SourceError",
            "tensors of the checkpoint have other shapes than its config.json says; the log names "
            "them",
            "take config.json and the weights from the same commit",
        ) from error
    for what, names in (
        ("lacks", sorted(told["missing_keys"])),
        (
            "has no place for",
            sorted(n for n in told["unexpected_keys"] if not n.endswith(COMPUTED)),
        ),
    ):
        if names:
            more = f" and {len(names) - 1} more tensors" if names[1:] else ""
            subject = "the checkpoint" if what == "lacks" else type(model).__name__
            raise WorkerError(
                "SourceError",
                f"{subject} {what} {names[0]}{more}",
                "take config.json and the weights from the same commit, whole",
            )
    return model
