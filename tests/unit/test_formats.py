"""What schemes promise on disk, against values that compressed-tensors 0.19.0 wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import floats, llama_tensors, safetensors_bytes, write_weights
from quantized import quantized_tensors

from quantize.formats import module_formats, unpack, weight_format
from quantize.quantization import Quantize
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


# compress_module and decompress_module of compressed_tensors.compressors, a weight of 1 x 32
FP4_PACKED = [24, 11, 147, 213, 152, 145, 20, 34, 65, 218, 36, 9, 98, 198, 36, 150]
MXFP4_SCALE = [123]
MXFP4_SIXTEENTHS = [
    *(0, 0.5, -1.5, 0, 1.5, -0.5, 3, -3, 0, -0.5, 0.5, -0.5, 2, 0.5, 1, 1),
    *(0.5, 2, -1, -3, 2, 1, -0.5, 0, 1, 4, 4, -2, 2, 1, 4, -0.5),
]
NVFP4_PACKED = [57, 29, 165, 247, 168, 162, 37, 52, 65, 235, 53, 9, 115, 214, 36, 151]
NVFP4_SCALE, NVFP4_GLOBAL_SCALE = [121, 126], 8768.0
NVFP4_IN_BF16 = [
    *(-0.0164794921875, 0.04931640625, -0.0986328125, 0.0164794921875, 0.0986328125),
    *(-0.032958984375, 0.197265625, -0.197265625, 0, -0.032958984375, 0.032958984375),
    *(-0.032958984375, 0.0986328125, 0.032958984375, 0.06591796875, 0.04931640625),
    *(0.0255126953125, 0.10205078125, -0.07666015625, -0.2041015625, 0.1533203125),
    *(0.07666015625, -0.0255126953125, 0, 0.07666015625, 0.306640625, 0.2041015625),
    *(-0.1533203125, 0.10205078125, 0.051025390625, 0.306640625, -0.0255126953125),
]


def test_floats_of_four_bits_that_compressed_tensors_packed(tmp_path: Path) -> None:
    def values(scheme: str, packed: list[int], **parts: tuple[str, np.ndarray]) -> np.ndarray:
        octets = np.array([packed], "u1")
        path = tmp_path / scheme
        path.write_bytes(safetensors_bytes({"weight_packed": ("U8", octets), **parts}))
        header, form = read_header(path), weight_format(scheme, None)
        stored = {name: (info.dtype, info.shape) for name, info in header.items()}
        assert stored == form.layout((1, 32), "BF16")
        return form.dequantized_rows(header, np.array([0]), 32)[0]

    scale = ("U8", np.array([MXFP4_SCALE], "u1"))
    found = values("MXFP4A16", FP4_PACKED, weight_scale=scale)
    assert (found * 16).tolist() == MXFP4_SIXTEENTHS
    scale = ("F8_E4M3", np.array([NVFP4_SCALE], "u1"))
    whole = ("F32", np.array([NVFP4_GLOBAL_SCALE], "<f4"))
    found = values("NVFP4A16", NVFP4_PACKED, weight_scale=scale, weight_global_scale=whole)
    np.testing.assert_allclose(found, NVFP4_IN_BF16, rtol=2**-8)


def test_exponents_that_are_no_number() -> None:
    values = weight_format("MXFP4A16", None).scale_values(np.array([0, 127, 254, 255], "u1"), "U8")
    assert values[:3].tolist() == [2.0**-127, 1, 2.0**127] and np.isnan(values[3])


CASES = [
    ("rtn", "W4A16", 32),
    ("rtn", "W4A16", "channel"),
    ("rtn", "W4A16_ASYM", "channel"),
    ("rtn", "W4A16_ASYM", 32),
    ("rtn", "W8A16", None),
    ("int8", "W8A8", None),
    ("fp8", "FP8_DYNAMIC", None),
    ("fp8", "FP8", None),
    ("fp8", "FP8_BLOCK", None),
    ("rtn", "NVFP4A16", None),
    ("rtn", "MXFP4A16", None),
]


@pytest.mark.parametrize(("method", "scheme", "group"), CASES)
def test_layout_and_values(
    tmp_path: Path, method: str, scheme: str, group: int | str | None
) -> None:
    quantize = Quantize(method=method, scheme=scheme, group_size=group)
    tensors = llama_tensors()
    write_weights(tmp_path, quantized_tensors(tensors, quantize))
    header = read_header(tmp_path / "model.safetensors")
    form = weight_format(scheme, quantize.effective_group_size)
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        weight = floats(tensors[f"{module}.weight"][1])
        layout = form.layout(weight.shape, "BF16")
        ours = {suffix: header[f"{module}.{suffix}"] for suffix in layout}
        assert {s: (info.dtype, info.shape) for s, info in ours.items()} == layout
        rows = np.arange(8, 40)
        values = form.dequantized_rows(ours, rows, weight.shape[1])
        error = np.linalg.norm(values - weight[rows]) / np.linalg.norm(weight)
        assert error < (0.14 if form.bits == 4 else 0.05)
        assert not np.allclose(values[:8], weight[:8], atol=0.01)  # really those rows


def test_a_layout_names_every_tensor() -> None:
    def names(scheme: str) -> set[str]:
        return set(weight_format(scheme, 128).layout((256, 128), "BF16"))

    assert names("W4A16_ASYM") == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
    }
    assert names("W4A16") == {"weight_packed", "weight_scale", "weight_shape"}
    assert names("FP8") == {"weight", "weight_scale", "input_scale"}
    assert names("W8A8") == {"weight", "weight_scale"}
    block = weight_format("FP8_BLOCK", None)
    assert block.layout((200, 256), "BF16")["weight_scale"] == ("BF16", (2, 2))  # rows are padded


def test_the_first_override_that_names_a_module_holds_and_ignore_beats_all() -> None:
    overrides = [
        {"modules": ["re:.*down_proj$", "model.layers.1.mlp.up_proj"], "scheme": "FP8_DYNAMIC"},
        {"modules": ["re:.*layers\\.1\\."], "scheme": "W8A16", "group_size": "channel"},
    ]
    formats = module_formats(
        Quantize.model_validate_json(
            json.dumps(
                {
                    "method": "awq",
                    "ignore": ["lm_head", "re:.*layers.0.mlp.down"],
                    "overrides": overrides,
                }
            )
        )
    )

    def scheme(module: str) -> str | None:
        form = formats.of(f"model.layers.{module}")
        return form and form.scheme

    assert scheme("0.mlp.down_proj") is None  # ignored
    assert scheme("1.mlp.down_proj") == scheme("1.mlp.up_proj") == "FP8_DYNAMIC"
    assert scheme("1.mlp.gate_proj") == "W8A16"
    assert scheme("0.mlp.gate_proj") == "W4A16_ASYM"
    assert scheme("0.mlp.down_proj_x") is None  # patterns need not reach the end of the name
    rule = formats.rule("model.layers.1.self_attn.q_proj")
    assert rule is not None
    assert (rule.key, rule.form.strategy) == ("quantize.overrides[1]", "channel")
    assert formats.of("x.model.layers.1.mlp.up_proj") == formats.rules[1].form  # re:.* reaches it
    assert formats.of("model.layers.11.mlp.up_proj") == formats.rules[2].form
