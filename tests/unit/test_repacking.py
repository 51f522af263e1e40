"""Whole checkpoints in other formats: equal weights, equal files after a round trip, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_json, floats, llama_tensors, write_checkpoint, write_weights
from quantized import write_quantized
from repacked import block, llama_numbers, write_stored

from quantize.artifact_formats import FORMATS
from quantize.checkpoint import read_checkpoint
from quantize.errors import SourceError, UsageError
from quantize.quantization import Quantize
from quantize.repacking import Repacked, repack
from quantize.stages.audit import audit_folder
from quantize.stored import read_linears
from quantize.tensors import load_tensor, to_float32
from quantize.unpacked import write_unpacked

NAMES = tuple(FORMATS)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def convert(source: Path, target: Path, name: str, **more: Any) -> Repacked:
    target.mkdir()
    return repack(source, target, FORMATS[name], silent, **more)


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    stored, linears = read_linears(read_checkpoint(folder, allow_quantized=True))
    return {
        module: stored.dequantized_rows(
            linear.form, linear.tensors, np.arange(linear.shape[0]), linear.shape
        )
        for module, linear in linears.items()
    }


def bits(folder: Path) -> dict[str, tuple[str, bytes]]:
    tensors = read_checkpoint(folder, allow_quantized=True).tensors
    return {name: (info.dtype, load_tensor(info).tobytes()) for name, info in tensors.items()}


def quantize_of(name: str, symmetric: bool, width: int = 4, group: int = 32) -> Quantize:
    scheme = f"W{width}A16" + ("" if symmetric else "_ASYM")
    given = {"method": "rtn", "scheme": scheme, "group_size": group, "format": name}
    return Quantize.model_validate_json(json.dumps(given))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_there_and_back(tmp_path: Path, first: str, second: str, symmetric: bool) -> None:
    if first == second:
        return
    numbers = llama_numbers(symmetric=symmetric)
    source = write_stored(tmp_path / "source", first, numbers, shards=3)
    done = convert(source, tmp_path / "there", second)
    assert (done.before, done.after, done.modules) == (first, second, 14)
    found = dequantized(tmp_path / "there")
    assert found.keys() == numbers.keys()
    for module, values in found.items():
        assert np.array_equal(values.view("<u4"), numbers[module].weight.view("<u4")), module
    assert bits(tmp_path / "there") == bits(write_stored(tmp_path / "specified", second, numbers))
    convert(tmp_path / "there", tmp_path / "back", first)
    assert bits(tmp_path / "back") == bits(source)
    total = sum(len(data) for _, data in bits(source).values())
    assert done.bytes_before == total
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names


@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_audit_knows_the_layouts(
    tmp_path: Path, name: str, symmetric: bool, dtype: str
) -> None:
    source = write_checkpoint(tmp_path / "source")
    numbers = llama_numbers(symmetric=symmetric, dtype=dtype)
    config = block(name, next(iter(numbers.values())), 0)
    ours = write_stored(tmp_path / "ours", name, numbers, config)
    audit = audit_folder(source, ours, quantize_of(name, symmetric))
    assert [check for check in audit["checks"] if not check["passed"]] == []
    assert audit["quantized_modules"] == 14
    assert audit["bytes"]["artifact"] == audit["bytes"]["expected"]
    details = {check["name"]: check["detail"] for check in audit["checks"]}
    assert details["quantization_config"].startswith(name)
    scales = sum(one.scale.size for one in numbers.values())
    assert details["scales are positive"] == f"{scales} scales"


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_audit_finds_damage(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "source")
    numbers = llama_numbers()
    numbers["model.layers.0.self_attn.q_proj"] = numbers["model.layers.1.self_attn.q_proj"]
    ours = write_stored(tmp_path / "ours", name, numbers)
    audit = audit_folder(source, ours, quantize_of(name, True))
    failed = {c["name"]: c["detail"] for c in audit["checks"] if not c["passed"]}
    assert failed.keys() == {"quantized weights are the source's"}
    edit_json(ours / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    failed = {
        c["name"]
        for c in audit_folder(source, ours, quantize_of(name, True))["checks"]
        if not c["passed"]
    }
    assert "quantization_config" in failed
    edit_json(ours / "config.json", {"quantization_config": {"quant_method": name, "dynamic": 1}})
    checks = audit_folder(source, ours, quantize_of(name, True))["checks"]
    assert "quantization_config" in {check["name"] for check in checks if not check["passed"]}
    tensors = {f"{Q_PROJ}.qzeros": ("I32", np.zeros((1, 1), "<i4"))}
    ours = write_stored(tmp_path / "other", name, llama_numbers(), changes=tensors)
    audit = audit_folder(source, ours, quantize_of(name, True))
    assert "q_proj.qzeros is I32 [1, 1]" in audit["checks"][0]["detail"]


def test_kept_tensors_in_fp16_are_the_sources_rounded_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    numbers = llama_numbers(symmetric=False, dtype="F16")
    kept = {
        name: ("F16", floats(values).astype("<f2"))
        for name, (_, values) in llama_tensors().items()
        if not name.endswith("_proj.weight")
    }
    ours = write_stored(tmp_path / "ours", "awq", numbers, changes=kept)
    quantize = quantize_of("awq", False)
    audit = audit_folder(source, ours, quantize)
    assert [check for check in audit["checks"] if not check["passed"]] == []
    details = {check["name"]: check["detail"] for check in audit["checks"]}
    said = details["unquantized tensors are identical"]
    assert said == f"{len(kept)} tensors; {len(kept)} in F16 instead of BF16, rounded once"
    name = "model.norm.weight"
    kept[name] = ("F16", np.nextafter(kept[name][1], np.float16(9)))
    ours = write_stored(tmp_path / "damaged", "awq", numbers, changes=kept)
    failed = [c for c in audit_folder(source, ours, quantize)["checks"] if not c["passed"]]
    assert [check["detail"] for check in failed] == ["model.norm.weight differs from the source"]


@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpacked_for_servers_without_a_kernel(tmp_path: Path, name: str, symmetric: bool) -> None:
    source = write_checkpoint(tmp_path / "source")
    numbers = llama_numbers(symmetric=symmetric)
    ours = write_stored(tmp_path / "ours", name, numbers)
    same = write_stored(tmp_path / "same", "compressed-tensors", numbers)
    for folder, form in ((ours, name), (same, "compressed-tensors")):
        target = tmp_path / f"unpacked {form}"
        write_unpacked(folder, source, quantize_of(form, symmetric), target, silent)
    found = bits(tmp_path / f"unpacked {name}")
    assert found == bits(tmp_path / "unpacked compressed-tensors")
    assert found.keys() == bits(source).keys()
    info = read_checkpoint(tmp_path / f"unpacked {name}").tensors[f"{Q_PROJ}.weight"]
    error = np.abs(to_float32(load_tensor(info), "BF16") - numbers[Q_PROJ].weight).max()
    assert error <= np.abs(numbers[Q_PROJ].weight).max() / 256  # half a step of BF16


def test_mixed_schemes_go_into_gptq_and_back(tmp_path: Path) -> None:
    overrides = [{"modules": ["re:.*mlp"], "scheme": "W8A16", "group_size": 64}]
    given = {"method": "rtn", "scheme": "W4A16", "group_size": 32, "overrides": overrides}
    quantize = Quantize.model_validate_json(json.dumps(given))
    source = write_quantized(tmp_path / "source", llama_tensors(), quantize)
    convert(source, tmp_path / "there", "gptq")
    there, before = dequantized(tmp_path / "there"), dequantized(source)
    assert all(np.array_equal(there[module], before[module]) for module in before)
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert bits(tmp_path / "back") == bits(source)
    original = write_checkpoint(tmp_path / "original")
    quantize = Quantize.model_validate_json(json.dumps(given | {"format": "gptq"}))
    audit = audit_folder(original, tmp_path / "there", quantize)
    assert [check for check in audit["checks"] if not check["passed"]] == []
    with pytest.raises(SourceError, match=r"awq cannot hold .* 8 bits|several number formats"):
        convert(source, tmp_path / "awq", "awq")


def test_kept_linears_and_biases(tmp_path: Path) -> None:
    numbers = llama_numbers()
    kept = "model.layers.1.mlp.down_proj"
    del numbers[kept]
    bias = {f"{Q_PROJ}.bias": ("BF16", np.arange(128, dtype="<u2"))}
    stated = block("compressed-tensors", numbers[Q_PROJ], 0)
    stated["ignore"].append(kept)
    source = write_stored(tmp_path / "source", "compressed-tensors", numbers, stated, changes=bias)
    for name in ("awq", "gptq"):
        convert(source, tmp_path / name, name)
        assert bits(tmp_path / name)[f"{Q_PROJ}.bias"] == bits(source)[f"{Q_PROJ}.bias"]
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        named = config["modules_to_not_convert"] if name == "awq" else list(config["dynamic"])
        assert [entry.replace("\\", "") for entry in named] == [
            kept if name == "awq" else f"-:^({kept})$"
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is not quantized"),
        ({"quant_method": "bitsandbytes"}, "is stored as 'bitsandbytes'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "'gemv', not"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, r"qzeros is I32 \[4, 16\], not"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "qweight is I32"),
        ({"quant_method": "awq", "bits": 4, "group_size": 7}, "groups of 7 do not divide"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(
    tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    source = write_stored(tmp_path / "source", "awq", llama_numbers())
    edit_json(source / "config.json", {"quantization_config": change})
    with pytest.raises(SourceError, match=message):
        convert(source, tmp_path / "target", "compressed-tensors")


def test_tensors_that_lie(tmp_path: Path) -> None:
    numbers = llama_numbers()
    cases: dict[str, tuple[str, Any]] = {
        "g_idx does not name": (f"{Q_PROJ}.g_idx", ("I32", np.full(128, 77, "<i4"))),
        "scales is I32": (f"{Q_PROJ}.scales", ("I32", np.zeros((4, 128), "<i4"))),
        "is not expected": (f"{Q_PROJ}.extra", ("I32", np.zeros(1, "<i4"))),
        "it has no qweight, or not in two": (f"{Q_PROJ}.qweight", ("I32", np.int32(3))),
    }
    for number, (message, (name, value)) in enumerate(cases.items()):
        changes = {name: (value[0], np.asarray(value[1]))}
        source = write_stored(tmp_path / str(number), "gptq", numbers, changes=changes)
        with pytest.raises(SourceError, match=message):
            convert(source, tmp_path / f"to {number}", "compressed-tensors")


def test_scales_that_readers_would_round(tmp_path: Path) -> None:
    numbers = llama_numbers()
    wide = {f"{Q_PROJ}.weight_scale": ("F32", floats(numbers[Q_PROJ].scale))}
    source = write_stored(tmp_path / "source", "compressed-tensors", numbers, changes=wide)
    with pytest.raises(SourceError, match=r"awq cannot hold .* scales in F32, which its readers"):
        convert(source, tmp_path / "target", "awq")


def test_what_is_stored_so_already(tmp_path: Path) -> None:
    source = write_stored(tmp_path / "source", "awq", llama_numbers())
    with pytest.raises(UsageError, match="stored as awq already"):
        convert(source, tmp_path / "target", "awq")


def test_a_card_of_another_artifact_stays_behind(tmp_path: Path) -> None:
    source = write_stored(tmp_path / "source", "awq", llama_numbers())
    (source / "README.md").write_text("served as AWQ")
    convert(source, tmp_path / "target", "gptq")
    assert not (tmp_path / "target" / "README.md").exists()


def test_weights_that_are_no_whole_words(tmp_path: Path) -> None:
    tensors = {
        name: value for name, value in llama_tensors().items() if not name.endswith("_proj.weight")
    }
    module = "model.layers.0.self_attn.q_proj"
    from repacked import compressed_tensors, numbers

    one = numbers(1, 12, 64, 4, 32, True)
    tensors |= {f"{module}.{s}": v for s, v in compressed_tensors(one).items()}
    source = write_stored(tmp_path / "source", "compressed-tensors", {module: one})
    for file in source.glob("*.safetensors"):
        file.unlink()
    write_weights(source, tensors)
    with pytest.raises(SourceError, match=r"12 outputs are no multiple of 8.* \(model.layers.0"):
        convert(source, tmp_path / "target", "awq")
