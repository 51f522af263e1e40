"""Unpacked checkpoints: the source's tensors by name and shape, with the packed ones' values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import llama_tensors, write_checkpoint
from quantized import quantized_tensors, write_quantized

from quantize.checkpoint import read_checkpoint
from quantize.errors import ToolError
from quantize.formats import module_formats
from quantize.model_files import INDEX
from quantize.quantization import Quantize
from quantize.tensors import load_tensor, to_float32
from quantize.unpacked import is_weight_only, write_unpacked

RECIPES = {
    "W4A16": {"method": "gptq", "scheme": "W4A16", "group_size": 32},
    "W4A16_ASYM": {"method": "awq", "group_size": 32},
    "channel": {"method": "gptq", "scheme": "W4A16", "group_size": "channel"},
    "W8A16": {"method": "rtn", "scheme": "W8A16", "group_size": 32},
    "NVFP4A16": {"method": "rtn", "scheme": "NVFP4A16"},
    "MXFP4A16": {"method": "rtn", "scheme": "MXFP4A16"},
    "mixed": {
        "method": "gptq",
        "group_size": 32,
        "overrides": [{"modules": ["re:.*down_proj"], "scheme": "W8A16", "group_size": 32}],
    },
}


def unpack(tmp_path: Path, quantize: Quantize) -> tuple[Path, Path, Path]:
    """Source, artifact and the unpacked checkpoint."""
    tensors = llama_tensors()
    source = write_checkpoint(tmp_path / "source", tensors=tensors)
    artifact = write_quantized(tmp_path / "artifact", tensors, quantize)
    target = tmp_path / "unpacked"
    target.mkdir()
    (target / "left by a killed run").touch()
    seen: list[tuple[int, int]] = []
    write_unpacked(artifact, source, quantize, target, lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] > 0
    return source, artifact, target


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_numbers_in_the_sources_shapes(name: str, tmp_path: Path) -> None:
    quantize = Quantize.model_validate_json(json.dumps(RECIPES[name]))
    source, artifact, target = unpack(tmp_path, quantize)
    before, after = read_checkpoint(source), read_checkpoint(target)
    packed = read_checkpoint(artifact, allow_quantized=True).tensors
    assert "quantization_config" not in after.config
    assert {n: (i.dtype, i.shape) for n, i in after.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in before.tensors.items()
    }
    formats, quantized = module_formats(quantize), 0
    for tensor, info in after.tensors.items():
        module = tensor.removesuffix(".weight")
        found = to_float32(load_tensor(info), info.dtype)
        original = to_float32(load_tensor(before.tensors[tensor]), "BF16")
        if f"{module}.weight_scale" not in packed:
            assert np.array_equal(found, original), tensor
            continue
        quantized += 1
        form = formats.of(module)
        assert form is not None
        parts = {
            n.removeprefix(f"{module}."): i for n, i in packed.items() if n.startswith(f"{module}.")
        }
        exact = form.dequantized_rows(parts, np.arange(info.shape[0]), info.shape[1])
        assert np.abs(found - exact).max() <= np.abs(exact).max() / 256  # half a step of BF16
        cosine = np.sum(found * original) / np.sqrt(np.sum(found**2) * np.sum(original**2))
        assert cosine > 0.98
    assert quantized == 14
    assert not (target / "left by a killed run").exists()


def test_an_index_names_the_unpacked_tensors(tmp_path: Path) -> None:
    quantize = Quantize.model_validate_json(json.dumps(RECIPES["W4A16"]))
    tensors = llama_tensors()
    source = write_checkpoint(tmp_path / "source", tensors=tensors)
    artifact = write_quantized(tmp_path / "artifact", tensors, quantize)
    names = dict.fromkeys(quantized_tensors(tensors, quantize), "model.safetensors")
    (artifact / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    write_unpacked(artifact, source, quantize, tmp_path / "unpacked", lambda *_: None)
    after = read_checkpoint(tmp_path / "unpacked")  # reads the index with care
    assert after.index.keys() == tensors.keys()


def test_weights_that_the_source_does_not_have(tmp_path: Path) -> None:
    quantize = Quantize.model_validate_json(json.dumps(RECIPES["W4A16"]))
    tensors = llama_tensors()
    source = write_checkpoint(tmp_path / "source", tensors=llama_tensors(layers=1))
    artifact = write_quantized(tmp_path / "artifact", tensors, quantize)
    with pytest.raises(ToolError, match=r"layers\.1\..* the source has no such weight"):
        write_unpacked(artifact, source, quantize, tmp_path / "unpacked", lambda *_: None)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"method": "awq"}, True),
        ({"method": "rtn", "scheme": "NVFP4A16"}, True),
        ({"method": "int8"}, False),
        ({"method": "fp8"}, False),
        ({"method": "fp8", "scheme": "FP8"}, False),
        ({"method": "gptq", "overrides": [{"modules": ["a"], "scheme": "FP8_DYNAMIC"}]}, False),
    ],
)
def test_activations_that_are_quantized_cannot_be_unpacked(
    block: dict[str, object], expected: bool
) -> None:
    assert is_weight_only(Quantize.model_validate_json(json.dumps(block))) is expected
