"""Run in the llmcompressor environment: a linear in every scheme, as compressed-tensors stores it.

    python make_formats.py FOLDER

Writes `<case>.safetensors` with the compressed tensors and, as `dequantized`, what
compressed-tensors itself makes of them, for each case of `CASES`.
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

SHAPE = (136, 256)
CASES = [
    ("W4A16", 32),
    ("W4A16", 128),
    ("W4A16", "channel"),
    ("W4A16_ASYM", 64),
    ("W4A16_ASYM", "channel"),
    ("W8A16", 128),
    ("W8A16", "channel"),
    ("W8A8", None),
    ("FP8_DYNAMIC", None),
    ("FP8", None),
    ("FP8_BLOCK", None),
    ("NVFP4A16", None),
    ("MXFP4A16", None),
]


def ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of what shares a scale."""
    rows, columns = weight.shape
    match args.strategy:
        case "group" | "tensor_group":
            parts = weight.reshape(rows, columns // args.group_size, args.group_size)
        case "channel":
            parts = weight.reshape(rows, 1, columns)
        case "tensor":
            parts = weight.reshape(1, -1)
        case "block":
            height, width = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % height))
            parts = padded.reshape(-1, height, columns // width, width)
            return parts.amin((1, 3)), parts.amax((1, 3))
    return parts.amin(-1), parts.amax(-1)


def quantized(name: str, group_size: int | str | None) -> torch.nn.Linear:
    """A linear with outliers, and the parameters that quantize it to nearest."""
    generator = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    weight = torch.randn(SHAPE, generator=generator) * torch.rand(SHAPE[0], 1, generator=generator)
    linear.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    scheme = preset_name_to_scheme(name, ["Linear"])
    if group_size is not None:
        changed = {"strategy": "channel", "group_size": None}
        if group_size != "channel":
            changed = {"group_size": group_size}
        scheme.weights = QuantizationArgs(**(scheme.weights.model_dump() | changed))
    low, high = ranges(linear.weight, scheme.weights)
    parameters = {}
    if scheme.weights.strategy == "tensor_group":
        parameters["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scale, zero = calculate_qparams(
        low, high, scheme.weights, parameters.get("weight_global_scale")
    )
    parameters |= {"weight_scale": scale, "weight_zero_point": zero}
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        parameters["input_scale"] = torch.tensor([0.0625], dtype=torch.bfloat16)
    for key, value in parameters.items():
        setattr(linear, key, torch.nn.Parameter(value, requires_grad=False))
    linear.quantization_scheme = scheme
    return linear


def main(folder: Path) -> None:
    for name, group_size in CASES:
        linear = quantized(name, group_size)
        compress_module(linear)
        tensors = {key: value.clone() for key, value in linear.state_dict().items()}
        decompress_module(linear)
        tensors["dequantized"] = linear.weight.detach().clone()
        save_file(tensors, folder / f"{name}-{group_size}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
