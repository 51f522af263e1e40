"""Checkpoints damaged on purpose, as a broken quantizer or a careless copy would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantize.tensors import TensorInfo, read_header

LAYER = "model.layers.1."


def tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder."""
    return {
        name: info
        for path in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(path).items()
    }


def edit(info: TensorInfo, change: Callable[[np.ndarray], None]) -> None:
    """Change a BF16 tensor in place; `change` gets its bits as uint16 of the tensor's shape."""
    assert info.dtype == "BF16", info
    bits = np.memmap(info.file, np.uint16, mode="r+", offset=info.start, shape=info.shape)
    change(bits)
    bits.flush()


def double_scales(folder: Path) -> None:
    """Every weight scale of one layer times two: one more in the exponent."""
    scales = [
        info
        for name, info in tensors(folder).items()
        if name.startswith(LAYER) and name.endswith("weight_scale")
    ]
    assert len(scales) == 7

    def double(bits: np.ndarray) -> None:
        bits += 1 << 7

    for info in scales:
        edit(info, double)


def zero_head(folder: Path) -> None:
    """One key-value head of one layer says nothing any more: its values' scales are zero."""
    config = json.loads((folder / "config.json").read_text())
    rows = config["hidden_size"] // config["num_attention_heads"]

    def silence(bits: np.ndarray) -> None:
        bits[:rows] = 0

    edit(tensors(folder)[LAYER + "self_attn.v_proj.weight_scale"], silence)


def swap_template(folder: Path) -> None:
    """Another model's chat template."""
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert config.get("chat_template") != template
    path.write_text(json.dumps(config | {"chat_template": template}))


def original(folder: Path) -> None:
    """No damage: the source checkpoint itself in the place of the quantized one."""
    source = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama" / "instruct"
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
