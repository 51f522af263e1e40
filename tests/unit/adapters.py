"""LoRA adapters as peft writes them, for tiny checkpoints; values are random."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantize.checkpoint import Checkpoint
from tests.unit.checkpoints import safetensors_bytes, write_json

RANK = 4
TARGETS = ("q_proj", "v_proj", "down_proj")
PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    base: Checkpoint,
    *,
    targets: Sequence[str] = TARGETS,
    add: Mapping[str, Sequence[int]] | None = None,
    drop: str = "",
    **config: Any,
) -> Path:
    """An adapter for `targets`; `add` are more tensors by shape, `drop` a pattern of names."""
    folder.mkdir(parents=True)
    shapes: dict[str, Sequence[int]] = {}
    for name, info in base.tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(targets)):
            out, fan_in = info.shape
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (RANK, fan_in)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (out, RANK)
    shapes |= {PREFIX + name: shape for name, shape in (add or {}).items()}
    generator = np.random.default_rng(0)
    tensors = {
        name: ("F32", generator.normal(0, 0.02, shape).astype("<f4"))
        for name, shape in shapes.items()
        if not (drop and re.search(drop, name))
    }
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": "somewhere/checkpoint",
    }
    write_json(folder / "adapter_config.json", values | config)
    return folder
