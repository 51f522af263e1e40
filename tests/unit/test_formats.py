"""What schemes promise on disk, against values that compressed-tensors 0.19.0 wrote."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import floats, llama_tensors, quantized_tensors, write_weights

from quantize.formats import unpack, weight_format
from quantize.recipe import Quantize
from quantize.tensors import read_header

# compressed_tensors.compressors.pack_quantized.helpers.pack_to_int32(values, bits)
FOUR_BITS = [
    [4, 7, -3, -8, -5, 3, -5, -1, 1, -5, -3, -6, -4, -1, -2, 0, 0, 4, 2, -7],
    [-2, -1, -1, 6, 0, -7, -3, 1, 5, 0, 1, -4, -5, -8, -5, -3, 6, 7, 7, -8],
]
FOUR_BITS_PACKED = [[1941112316, -2039208647, 6856], [-1793529994, 1392724365, 4094]]
EIGHT_BITS = [[-46, -29, 88, 49, 115], [-99, 19, 19, 14, 39]]
EIGHT_BITS_PACKED = [[-1311218862, 243], [-1902931171, 167]]
ZEROS = [[-8, -7], [1, 1], [7, -8], [7, 2], [-4, -1], [-5, 6], [3, -6], [-1, 4], [-6, -8], [-8, -4]]
ZEROS_PACKED = [[2067070864, -1025007471], [2, 64]]  # packed_dim=0


def test_unpacking_what_compressed_tensors_packed() -> None:
    assert unpack(np.array(FOUR_BITS_PACKED, "<i4"), 4)[:, :20].tolist() == FOUR_BITS
    assert unpack(np.array(EIGHT_BITS_PACKED, "<i4"), 8)[:, :5].tolist() == EIGHT_BITS
    assert unpack(np.array(ZEROS_PACKED, "<i4").T, 4).T[:10].tolist() == ZEROS
    with pytest.raises(ValueError, match="3 bits"):
        unpack(np.array(FOUR_BITS_PACKED, "<i4"), 3)


CASES = [
    ("rtn", "W4A16", 32),
    ("rtn", "W4A16_ASYM", 32),
    ("rtn", "W8A16", None),
    ("int8", "W8A8", None),
    ("fp8", "FP8_DYNAMIC", None),
    ("fp8", "FP8", None),
    ("fp8", "FP8_BLOCK", None),
]


@pytest.mark.parametrize(("method", "scheme", "group"), CASES)
def test_layout_and_values(tmp_path: Path, method: str, scheme: str, group: int | None) -> None:
    quantize = Quantize(method=method, scheme=scheme, group_size=group)
    tensors = llama_tensors()
    write_weights(tmp_path, quantized_tensors(tensors, quantize))
    header = read_header(tmp_path / "model.safetensors")
    form = weight_format(quantize)
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        weight = floats(tensors[f"{module}.weight"][1])
        layout = form.layout(weight.shape, "BF16")
        ours = {suffix: header[f"{module}.{suffix}"] for suffix in layout}
        assert {s: (info.dtype, info.shape) for s, info in ours.items()} == layout
        rows = np.arange(8, 40)
        values = form.dequantized_rows(ours, rows, weight.shape[1])
        error = np.linalg.norm(values - weight[rows]) / np.linalg.norm(weight)
        assert error < (0.1 if form.bits == 4 else 0.05)
        assert not np.allclose(values[:8], weight[:8], atol=0.01)  # really those rows


def test_a_layout_names_every_tensor() -> None:
    def names(method: str, scheme: str) -> set[str]:
        return set(weight_format(Quantize(method=method, scheme=scheme)).layout((256, 128), "BF16"))

    assert names("awq", "W4A16_ASYM") == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
    }
    assert names("gptq", "W4A16") == {"weight_packed", "weight_scale", "weight_shape"}
    assert names("fp8", "FP8") == {"weight", "weight_scale", "input_scale"}
    assert names("int8", "W8A8") == {"weight", "weight_scale"}
    block = weight_format(Quantize(method="fp8", scheme="FP8_BLOCK"))
    assert block.layout((200, 256), "BF16")["weight_scale"] == ("BF16", (2, 2))  # rows are padded
