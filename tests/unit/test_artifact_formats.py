"""AWQ and GPTQ: layouts against packers of the specifications, and repacking bit by bit."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from repacked import PACKERS, Numbers, block, floats, gptq, numbers

from quantize.artifact_formats import FORMATS, Facts, Grid
from quantize.formats import weight_format
from quantize.quantization import Quantize
from quantize.stored import form_of

PAIRS = [(a, b) for a in FORMATS for b in FORMATS if a != b]


@st.composite
def weights(draw: st.DrawFn, bits: int | None = None) -> Numbers:
    """Shapes that every format holds, of every kind of grid."""
    bits = bits or draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([32, 64, 128, None]))
    columns = (group or 32) * draw(st.integers(1, 3))
    rows = 8 * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(["BF16", "F16"]))
    seed = draw(st.integers(0, 2**32 - 1))
    return numbers(seed, rows, columns, bits, group or columns, draw(st.booleans()), dtype)


def facts(one: Numbers) -> Facts:
    columns = one.codes.shape[1]
    return Facts(one.bits, None if one.group == columns else one.group, one.symmetric)


def arrays(name: str, one: Numbers) -> dict[str, np.ndarray]:
    return {suffix: value for suffix, (_, value) in PACKERS[name](one).items()}


def read(name: str, one: Numbers, stored: dict[str, np.ndarray] | None = None) -> Grid:
    shape = one.codes.shape
    found = arrays(name, one) if stored is None else stored
    return FORMATS[name].read(facts(one), shape, found, block(name, one, shape[1]))


def dequantized(grid: Grid, one: Numbers) -> np.ndarray:
    scale = floats(grid.scale) if one.scale_dtype == "BF16" else grid.scale.astype("<f4")
    return grid.dequantized(np.arange(len(one.codes)), scale)


def written(name: str, grid: Grid, symmetric: bool) -> dict[str, np.ndarray]:
    parts = FORMATS[name].write(grid, symmetric)
    return {suffix: np.concatenate(list(pieces)) for suffix, pieces in parts.items()}


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_reading_and_writing_agree_with_the_specification(name: str, data: st.DataObject) -> None:
    one = data.draw(weights(4 if name == "awq" else None))
    specified, grid = arrays(name, one), read(name, one)
    assert np.array_equal(dequantized(grid, one).view("<u4"), one.weight.view("<u4"))
    ours = written(name, grid, one.symmetric)
    assert ours.keys() == specified.keys()
    for suffix, values in specified.items():
        assert ours[suffix].dtype == values.dtype, suffix
        assert np.array_equal(ours[suffix], values), suffix


@pytest.mark.parametrize(("first", "second"), PAIRS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_repacking_there_and_back_changes_no_bit(
    first: str, second: str, data: st.DataObject
) -> None:
    one = data.draw(weights(4 if "awq" in (first, second) else None))
    there = written(second, read(first, one), one.symmetric)
    assert {s: v.tolist() for s, v in there.items()} == {
        s: v.tolist() for s, v in arrays(second, one).items()
    }
    between = read(second, one, there)
    assert np.array_equal(dequantized(between, one).view("<u4"), one.weight.view("<u4"))
    back = written(first, between, one.symmetric)
    for suffix, values in arrays(first, one).items():
        assert np.array_equal(back[suffix], values), suffix


@pytest.mark.parametrize("name", FORMATS)
def test_some_rows_and_columns(name: str) -> None:
    one = numbers(3, 24, 128, 4, 32, False)
    grid = read(name, one)
    rows = np.array([17, 3, 4, 3])
    assert np.array_equal(grid.codes(rows, slice(0, 128)), one.codes[rows])
    assert np.array_equal(grid.codes(rows, slice(24, 72)), one.codes[rows, 24:72])


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_are_those_of_the_specification(name: str) -> None:
    for bits, group, symmetric in ((4, 32, True), (4, 96, False), (8, 32, True)):
        if name == "awq" and bits == 8:
            continue
        one = numbers(0, 16, 96, bits, group, symmetric)
        form = form_of(facts(one))
        layout = FORMATS[name].layout(form, (16, 96), "BF16")
        found = {
            suffix: (dtype, value.shape) for suffix, (dtype, value) in PACKERS[name](one).items()
        }
        assert layout == found
        assert FORMATS[name].shape(facts(one), arrays(name, one)) == (16, 96)


# What the packages themselves made of 32 x 32 codes (7 * row + 3 * column) % 16 and of these zero
# points, repeated every 8 rows, with scales that are powers of two, so that nothing is rounded:
# WQLinear_GEMM.from_linear of AutoAWQ 0.2.9, and TorchLinear.pack_original of GPTQModel 7.7.0 with
# convert_gptq_v2_to_v1_format_module after it.
ZERO = [3, 0, 15, 8, 1, 12, 7, 4]
AWQ_FIRST_WORDS = [
    *(324512992, 1183506195, 2042430022, -1394592391, -552376148, 38181855, 897175042, 1756164405),
    *(-1679874968, -838707301, -248149298, 610844145, 1469833252, -1966206121, -1108261238),
    -534480451,
]
AWQ_ZEROS = 1283486195
GPTQ_FIRST_WORDS = [
    *(1392285232, -916255321, 819622942, -1488852091, 515396348, -2060465821, -57265958),
    *(1661839169, -629924168, 1105954095, -1202520938, 801727245, -1775183244, 229065195),
    *(1948170322, -343593015),
]
GPTQ_ZEROS = {1: 917536242, 2: 1203867395}
GPTQ_SYMMETRIC_ZEROS = {1: 2004318071, 2: -2004318072}


def known(symmetric: bool) -> Numbers:
    row, column = np.arange(32)[:, None], np.arange(32)[None]
    zero = np.full((32, 1), 8) if symmetric else np.array([ZERO * 4]).T
    scale = (2.0 ** -(np.arange(32) % 3)).astype("<f2")[:, None]
    return Numbers(4, 32, (7 * row + 3 * column) % 16, zero, scale, "F16", symmetric)


def test_words_that_autoawq_and_gptqmodel_packed() -> None:
    one = known(symmetric=False)
    ours = written("awq", read("compressed-tensors", one), False)
    assert ours["qweight"][:16, 0].tolist() == AWQ_FIRST_WORDS
    assert ours["qweight"].shape == (32, 4)
    assert ours["qzeros"].tolist() == [[AWQ_ZEROS] * 4]
    ours = written("gptq", read("compressed-tensors", one), False)
    assert ours["qweight"][0, :16].tolist() == GPTQ_FIRST_WORDS
    assert ours["qweight"].shape == (4, 32)
    assert ours["qzeros"].tolist() == [[GPTQ_ZEROS[2]] * 4]
    stated = {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    ours["qzeros"][:] = GPTQ_ZEROS[1]
    assert FORMATS["gptq"].read(facts(one), (32, 32), ours, stated).zeros[:8, 0].tolist() == ZERO
    ours = written("gptq", read("compressed-tensors", known(symmetric=True)), True)
    assert ours["qzeros"].tolist() == [[GPTQ_SYMMETRIC_ZEROS[1]] * 4]
    ours["qzeros"][:] = GPTQ_SYMMETRIC_ZEROS[2]
    stated = {"checkpoint_format": "gptq_v2"}
    assert FORMATS["gptq"].read(facts(one), (32, 32), ours, stated).centred


def test_group_indexes_out_of_order_are_read_and_refused_where_they_cannot_be_stored() -> None:
    one = numbers(5, 8, 64, 4, 32, True)
    order = np.random.default_rng(0).permutation(np.arange(64) // 32)
    stored = {s: v for s, (_, v) in gptq(one, order).items()}
    grid = read("gptq", one, stored)
    scale = floats(one.scale)
    expected = (one.codes.astype("<f4") - 8) * scale[:, order]
    assert np.array_equal(dequantized(grid, one), expected)
    assert np.array_equal(written("gptq", grid, True)["g_idx"], order)
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="activation order"):
            FORMATS[name].write(grid, True)
    stored["g_idx"] = np.full(64, 2, "<i4")
    with pytest.raises(ValueError, match="g_idx does not name one of 2 groups"):
        read("gptq", one, stored)


def test_what_the_first_version_of_gptq_cannot_say() -> None:
    one = numbers(6, 8, 32, 4, 32, False)  # one zero point is 0
    assert one.zero[0, 0] == 0
    words = arrays("gptq", one)
    # gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module: from whole words, with a borrow
    less = (words["qzeros"].view("<u4") - np.uint32(0x11111111)).view("<i4")
    stated = block("gptq", one, 32) | {"checkpoint_format": "gptq"}
    read_v1 = FORMATS["gptq"].read
    ambiguous = {**words, "qzeros": less}
    with pytest.raises(ValueError, match="some readers take for 0"):
        read_v1(facts(one), (8, 32), ambiguous, stated)
    stated |= {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    grid = read_v1(facts(one), (8, 32), ambiguous, stated)
    assert np.array_equal(grid.zeros, one.zero)


def test_a_symmetric_grid_must_be_one() -> None:
    grid = read("awq", numbers(7, 8, 32, 4, 32, False))
    for name in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match="not in the middle"):
            FORMATS[name].write(grid, True)
    assert read("awq", numbers(7, 8, 32, 4, 32, True)).centred


def test_awq_has_four_bits() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        FORMATS["awq"].write(read("gptq", numbers(8, 8, 32, 8, 32, True)), True)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"method": "fp8"}, "format awq cannot hold scheme FP8_DYNAMIC"),
        ({"method": "rtn", "scheme": "W8A16"}, "format awq cannot hold scheme W8A16"),
        ({"method": "rtn", "scheme": "NVFP4A16"}, "format awq cannot hold scheme NVFP4A16"),
        (
            {"method": "awq", "overrides": [{"modules": ["a"], "scheme": "W8A16"}]},
            "format awq cannot hold overrides",
        ),
        ({"method": "awq", "kv_cache": "fp8"}, "format awq cannot hold kv_cache"),
        ({"format": "gptq", "method": "int8"}, "format gptq cannot hold scheme W8A8"),
        ({"format": "gptq", "method": "gptq", "kv_cache": "fp8"}, "gptq cannot hold kv_cache"),
        (
            {
                "format": "gptq",
                "method": "gptq",
                "overrides": [{"modules": ["a"], "scheme": "W4A16_ASYM"}],
            },
            "overrides that mix symmetric and asymmetric",
        ),
        (
            {
                "format": "gptq",
                "method": "gptq",
                "overrides": [{"modules": ["a"], "scheme": "FP8_DYNAMIC"}],
            },
            "format gptq cannot hold scheme FP8_DYNAMIC",
        ),
    ],
)
def test_a_recipe_says_which_part_does_not_fit(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        Quantize.model_validate_json(json.dumps({"format": "awq"} | changes))


@pytest.mark.parametrize(
    "block_",
    [
        {"format": "awq", "method": "awq"},
        {"format": "awq", "method": "gptq"},
        {"format": "gptq", "method": "gptq"},
        {"format": "gptq", "method": "awq"},
        {"format": "gptq", "method": "gptq", "activation_order": "weight"},
        {
            "format": "gptq",
            "method": "gptq",
            "overrides": [{"modules": ["a"], "scheme": "W8A16"}],
        },
        {"format": "compressed-tensors", "method": "fp8"},
    ],
)
def test_a_recipe_that_fits(block_: dict[str, Any]) -> None:
    made = Quantize.model_validate_json(json.dumps(block_))
    assert made.repacks == (block_["format"] != "compressed-tensors")


def test_shapes_that_do_not_fill_words() -> None:
    form = weight_format("W4A16", 32)
    assert FORMATS["awq"].cannot_store(form, (12, 64)) == (
        "12 outputs are no multiple of 8, which share a word"
    )
    assert FORMATS["awq"].cannot_store(form, (16, 20)) is None
    assert FORMATS["gptq"].cannot_store(form, (16, 20)) is not None
    assert FORMATS["gptq"].cannot_store(weight_format("W8A16", 32), (12, 20)) is None
    assert FORMATS["compressed-tensors"].cannot_store(form, (3, 5)) is None


def test_names_that_awq_cannot_leave_out() -> None:
    awq = FORMATS["awq"]
    assert awq.cannot_name(["l.0.mlp.gate_proj"], ["lm_head", "l.1.mlp.up_proj"]) is None
    why = awq.cannot_name(["l.0.mlp.gate_proj"], ["l.0.mlp.gate"])
    assert why is not None and "l.0.mlp.gate left out while l.0.mlp.gate_proj is quantized" in why
    assert "quantized lm_head" in str(awq.cannot_name(["lm_head"], []))


def test_configs() -> None:
    four, eight = Facts(4, 128, True), Facts(8, 64, True)
    q = "model.layers.0.self_attn.q_proj"
    quantized = {"a": four, "b": four, q: eight}
    kept = ["lm_head", "model.layers.1.mlp.up_proj"]
    made = FORMATS["gptq"].config(quantized, kept)
    assert made["bits"] == 4 and made["group_size"] == 128 and made["sym"] is True
    assert made["checkpoint_format"] == "gptq" and made["desc_act"] is False
    assert list(made["dynamic"].values()) == [{}, {"bits": 8, "group_size": 64, "sym": True}]
    joined = r"+:^(model\.layers\.0\.self_attn\.q_proj|model\.layers\.0\.self_attn\.qkv_proj)$"
    assert joined in made["dynamic"]
    assert FORMATS["gptq"].config_faults(made, quantized, kept) == []
    assert FORMATS["gptq"].facts(made, q) == eight
    with pytest.raises(ValueError, match="several number formats"):
        FORMATS["awq"].config(quantized, kept)
    with pytest.raises(ValueError, match="symmetric and asymmetric"):
        FORMATS["gptq"].config({"a": four, "b": Facts(4, 128, False)}, kept)
    made = FORMATS["awq"].config({"a": four}, kept)
    assert made["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    assert FORMATS["awq"].config_faults(made, {"a": four}, kept) == []
    made = FORMATS["compressed-tensors"].config(quantized, kept)
    assert made["ignore"] == kept
    assert {module: FORMATS["compressed-tensors"].facts(made, module) for module in quantized} == (
        quantized
    )


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("awq", {"bits": 8}, "bits is 8, not 4"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point is False"),
        ("awq", {"group_size": 64}, r"group_size is 64, not \[128\]"),
        ("awq", {"modules_to_not_convert": None}, "lacks x.up"),
        ("awq", {"modules_to_not_convert": ["x.up", "b"]}, "has b, but b is quantized"),
        ("gptq", {"bits": 8}, "a is said to have"),
        ("gptq", {"sym": False}, "a is said to have"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"dynamic": {}}, "dynamic lacks x.up"),
        ("gptq", {"dynamic": {"-:.*": {}}}, "leaves out a, which is quantized"),
    ],
)
def test_configs_that_lie(name: str, change: dict[str, Any], fault: str) -> None:
    quantized, kept = {"a": Facts(4, 128, True), "b": Facts(4, 128, True)}, ["lm_head", "x.up"]
    made = FORMATS[name].config(quantized, kept)
    faults = FORMATS[name].config_faults(made | change, quantized, kept)
    assert len(faults) >= 1
    assert any(re.search(fault, one) for one in faults), faults


@pytest.mark.parametrize(
    ("name", "stated", "why"),
    [
        ("awq", {"bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ("awq", {"w_bit": 3, "q_group_size": 128}, "3 bits"),
        ("awq", {"bits": 4}, "group_size of quantization_config is None"),
        ("gptq", {"bits": 3, "group_size": 128}, "3 bits"),
        ("gptq", {"bits": "4", "group_size": 128}, "'4', not a whole number"),
        ("gptq", {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"bits": 4, "group_size": 128, "dynamic": []}, "dynamic of quantization_config"),
        ("gptq", {"bits": 4, "group_size": 128, "dynamic": {"(": {}}}, "no.* regular expression"),
        ("compressed-tensors", {}, "0 config groups"),
        ("compressed-tensors", {"config_groups": {"a": 1}}, "config_groups.a"),
        ("compressed-tensors", {"config_groups": {"a": {"targets": [1]}}}, "are no names"),
        ("compressed-tensors", {"config_groups": {"a": {"targets": ["re:("]}}}, "regular"),
        (
            "compressed-tensors",
            {"format": "float-quantized", "config_groups": {"a": {"targets": ["Linear"]}}},
            "format float-quantized, not pack-quantized",
        ),
    ],
)
def test_configs_that_are_not_for_us(name: str, stated: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FORMATS[name].facts(stated, "a")
