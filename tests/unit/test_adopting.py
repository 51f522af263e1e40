"""`quantize measure`: what an artifact from elsewhere is, and the recipe that measures it."""

import json
import re

import checkpoints
import numpy as np
import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from quantized import quantized_tensors, write_quantized

from quantize.adopting import Request, describe, write_recipe
from quantize.checkpoint import read_checkpoint
from quantize.errors import SourceError, UsageError
from quantize.quantization import Quantize
from quantize.recipe_file import load_recipe
from quantize.stages.adopt import made_by


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", llama_tensors(), llama_config())


def artifact(folder, **block):
    return write_quantized(folder, llama_tensors(), Quantize(**block))


def packed(folder, block):
    """A checkpoint with the names that AWQ and GPTQ give, and this quantization_config."""
    tensors = {}
    for name, value in llama_tensors().items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors[f"{module}.qweight"] = ("I32", np.zeros((16, 4), "<i4"))
            tensors[f"{module}.scales"] = ("F16", np.ones((4, 4), "<u2"))
        else:
            tensors[name] = value
    return write_checkpoint(folder, tensors, llama_config() | {"quantization_config": block})


@pytest.mark.parametrize(
    ("made", "method", "scheme", "group_size"),
    [
        ({"method": "gptq", "group_size": 32}, "rtn", "W4A16", 32),
        ({"method": "awq", "group_size": 64}, "rtn", "W4A16_ASYM", 64),
        ({"method": "rtn", "group_size": "channel"}, "rtn", "W4A16", "channel"),
        ({"method": "fp8"}, "fp8", "FP8_DYNAMIC", None),
        ({"method": "int8"}, "int8", "W8A8", None),
        ({"method": "rtn", "scheme": "NVFP4A16"}, "rtn", "NVFP4A16", None),
    ],
)
def test_a_compressed_tensors_artifact_is_told_by_its_config(
    tmp_path, made, method, scheme, group_size
):
    folder = artifact(tmp_path / "theirs", **made)
    block = describe(read_checkpoint(folder, allow_quantized=True))
    assert (block["method"], block["scheme"]) == (method, scheme)
    assert block.get("group_size") == group_size
    assert block["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            {"method": "awq", "scheme": "W4A16_ASYM", "group_size": 128, "format": "awq"},
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": True},
            {
                "method": "gptq",
                "scheme": "W4A16",
                "group_size": "channel",
                "format": "gptq",
                "activation_order": "weight",
            },
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True},
            {"method": "gptq", "scheme": "W8A16", "group_size": 64, "format": "gptq"},
        ),
    ],
)
def test_awq_and_gptq_say_what_they_are(tmp_path, stated, expected):
    folder = packed(tmp_path / "theirs", stated)
    block = describe(read_checkpoint(folder, allow_quantized=True))
    assert block == expected | {"ignore": ["lm_head"]}
    Quantize.model_validate_json(json.dumps(block | {"artifact": "theirs"}))


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "stored as 'bitsandbytes'"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "AWQ of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv", "group_size": 128}, "gemv"),
        ({"quant_method": "gptq", "bits": 8, "sym": False, "group_size": 128}, "asymmetric"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "many"}, "group_size"),
        ({"quant_method": "gptq", "bits": [4], "group_size": 128}, "bits"),
        ({"quant_method": "compressed-tensors"}, "0 groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "no scheme"),
    ],
)
def test_what_no_recipe_could_ask_for_is_refused(tmp_path, stated, says):
    folder = packed(tmp_path / "theirs", stated)
    with pytest.raises(SourceError, match=re.escape(says)):
        describe(read_checkpoint(folder, allow_quantized=True))


def test_a_checkpoint_that_is_not_quantized(source):
    with pytest.raises(SourceError, match="not quantized"):
        describe(read_checkpoint(source))


def test_a_method_that_does_not_make_the_scheme(tmp_path):
    folder = artifact(tmp_path / "theirs", method="fp8")
    with pytest.raises(UsageError, match="awq does not produce FP8_DYNAMIC"):
        describe(read_checkpoint(folder, allow_quantized=True), "awq")


def test_linears_that_were_left_alone_are_ignored_by_name(tmp_path):
    tensors = llama_tensors()
    folder = artifact(tmp_path / "theirs", method="rtn", group_size=32)
    kept = "model.layers.1.mlp.down_proj"
    made = quantized_tensors(tensors, Quantize(method="rtn", group_size=32))
    made = {name: value for name, value in made.items() if not name.startswith(f"{kept}.")}
    made[f"{kept}.weight"] = tensors[f"{kept}.weight"]
    checkpoints.write_weights(folder, made)
    block = describe(read_checkpoint(folder, allow_quantized=True))
    assert block["ignore"] == ["lm_head", kept]


def test_the_recipe_loads_and_says_what_the_artifact_is(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "their model", method="awq", group_size=32)
    request = Request("their model", str(source), suite="tiny", method="awq")
    path = write_recipe(request)
    recipe = load_recipe(path)
    assert recipe.quantize.engine == "elsewhere"
    assert recipe.quantize.artifact == str(tmp_path / "their model")
    assert (recipe.quantize.method, recipe.quantize.effective_group_size) == ("awq", 32)
    assert recipe.evaluate is not None
    assert recipe.evaluate.suite == "tiny"
    assert not recipe.calibrates
    assert not recipe.quantize.repacks
    assert write_recipe(request) == path  # the same again: to go on after a kill


def test_another_file_is_not_overwritten(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "theirs", method="awq", group_size=32)
    output = tmp_path / "mine.yaml"
    output.write_text("precious: true\n")
    request = Request("theirs", str(source), output=output)
    with pytest.raises(UsageError, match="exists and says something else"):
        write_recipe(request)
    assert output.read_text() == "precious: true\n"


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"artifact": "theirs", "engine": "stream"}, "go together"),
        ({"engine": "elsewhere"}, "go together"),
        ({"artifact_revision": "a" * 40}, "artifact_revision without artifact"),
    ],
)
def test_an_artifact_and_its_engine_go_together(block, says):
    with pytest.raises(ValueError, match=says):
        Quantize(method="awq", **block)


def test_who_made_it_is_what_its_config_says():
    meta = {"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    assert made_by({"quantization_config": meta}) == "gptq, gptqmodel:7.7.0"
    assert (
        made_by({"quantization_config": {"quant_method": "awq", "version": "gemm"}}) == "awq, gemm"
    )
    assert made_by({}) == "an unknown tool"
