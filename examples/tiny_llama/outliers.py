"""Activation outliers that leave the function as it was, and simulated round-to-nearest.

A model of this size has no activation outliers, so activation-aware methods gain nothing on it.
Multiplying a channel where it is written (a norm's weight, a row of up_proj) by a power of two and
dividing the input column of every linear that reads it changes no product: scaling by a power of
two is exact in BF16. The activations then have channels as large as those of big models. The
columns that read them are small within their quantization group, so that round-to-nearest drops
them, although they matter most: the channels are those with the largest effect.
"""

from __future__ import annotations

from random import Random

import torch
from torch import nn

SCALES = (8.0, 16.0, 32.0)
# Writer of a channel → the linears that read it, and how many channels become outliers.
WRITERS = {
    "input_layernorm": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 16),
    "post_attention_layernorm": (("mlp.gate_proj", "mlp.up_proj"), 16),
    "mlp.up_proj": (("mlp.down_proj",), 8),
}
Scales = dict[str, torch.Tensor]  # writer → factor of each channel


def readers(writer: str) -> list[str]:
    """The linears that read what that norm or linear writes."""
    layer, kind = _split(writer)
    return [f"{layer}.{name}" for name in WRITERS[kind][0]]


def _split(writer: str) -> tuple[str, str]:
    """Layer and kind: model.layers.0.mlp.up_proj → model.layers.0, mlp.up_proj."""
    parts = writer.split(".")
    return ".".join(parts[:3]), ".".join(parts[3:])


@torch.no_grad()
def draw_scales(model: nn.Module, seed: int) -> Scales:
    """A factor for each channel: one, and for the channels with the largest effect a power of two.

    The effect of a channel is taken as the norm of what writes it times the norm of the columns
    that read it.
    """
    rng = Random(f"outliers:{seed}")
    scales = {}
    for layer in range(model.config.num_hidden_layers):
        for kind, (_, count) in WRITERS.items():
            writer = f"model.layers.{layer}.{kind}"
            written = model.get_submodule(writer).weight.float()  # (channels,) or (channels, in)
            written = written.abs() if written.ndim == 1 else written.norm(dim=1)
            columns = [model.get_submodule(name).weight.float() for name in readers(writer)]
            effect = written * torch.cat(columns).norm(dim=0)
            factors = torch.ones_like(effect)
            for channel in effect.topk(count).indices.tolist():
                factors[channel] = rng.choice(SCALES)
            scales[writer] = factors
    return scales


@torch.no_grad()
def scale_model(model: nn.Module, scales: Scales) -> None:
    """Multiply what writes the channels and divide what reads them, in place."""
    for writer, factors in scales.items():
        factors = factors.to(torch.bfloat16)
        written = model.get_submodule(writer).weight
        written.mul_(factors if written.ndim == 1 else factors[:, None])
        for name in readers(writer):
            model.get_submodule(name).weight.div_(factors)


def scale_adapter(tensors: dict[str, torch.Tensor], scales: Scales) -> dict[str, torch.Tensor]:
    """The LoRA tensors for the scaled base: rows of B that write multiply, columns of A divide."""
    scaled = dict(tensors)

    def key(name: str, part: str) -> str:
        (found,) = [k for k in tensors if f".{name}.lora_{part}." in k]
        return found

    for writer, factors in scales.items():
        if writer.endswith("_proj"):
            name = key(writer, "B")
            scaled[name] = scaled[name] * factors[:, None].to(scaled[name].dtype)
        for reader in readers(writer):
            name = key(reader, "A")
            scaled[name] = scaled[name] / factors.to(scaled[name].dtype)
    return scaled


@torch.no_grad()
def round_to_nearest(model: nn.Module, bits: int = 4, group: int = 128) -> None:
    """Quantize every linear but lm_head in place, asymmetric, per group of input columns.

    Simulated W4A16 without calibration: scale = (max - min) / (2^bits - 1) of each group, computed
    in FP32, the result stored in BF16.
    """
    top = 2**bits - 1
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        weight = module.weight.float()
        grouped = weight.view(weight.shape[0], -1, group)  # (out, groups, group)
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        high = grouped.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / top).clamp(min=1e-8)
        zero = (-low / step).round()
        codes = ((grouped / step).round() + zero).clamp(0, top)
        module.weight.copy_(((codes - zero) * step).view_as(weight))
