"""The audit: sound artifacts of every scheme pass, and each kind of damage fails its check."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    bf16,
    edit_json,
    floats,
    llama_config,
    llama_tensors,
    write_checkpoint,
    write_json,
    write_weights,
)
from quantized import quantized_tensors, write_quantized
from records_fixture import artifact, new_store, stage_context
from test_formats import CASES

from quantize.artifact_checks import not_finite
from quantize.errors import SourceError, ToolError
from quantize.progress import LineView, Progress
from quantize.quantization import Quantize
from quantize.runner import Runner
from quantize.stages import audit as stage
from quantize.stages.audit import audit_folder

ASYM = Quantize(method="rtn", scheme="W4A16_ASYM", group_size=32)
FP8 = Quantize(method="fp8", scheme="FP8")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def failed(source: Path, ours: Path, quantize: Quantize = ASYM) -> dict[str, str]:
    """Name and detail of each check that failed."""
    audit = audit_folder(source, ours, quantize)
    return {check["name"]: check["detail"] for check in audit["checks"] if not check["passed"]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=3)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write_quantized(tmp_path / "ours", llama_tensors(), ASYM)


def damage(folder: Path, quantize: Quantize = ASYM, **changes: Any) -> None:
    """Write the artifact's weights with some tensors replaced, or removed by None."""
    tensors = quantized_tensors(llama_tensors(), quantize) | changes
    write_weights(folder, {name: value for name, value in tensors.items() if value is not None})


@pytest.mark.parametrize(("method", "scheme", "group"), CASES)
def test_a_sound_artifact_passes(
    tmp_path: Path, source: Path, method: str, scheme: str, group: int | str | None
) -> None:
    quantize = Quantize(method=method, scheme=scheme, group_size=group)
    ours = write_quantized(tmp_path / "ours", llama_tensors(), quantize)
    audit = audit_folder(source, ours, quantize)
    assert [check for check in audit["checks"] if not check["passed"]] == []
    assert len(audit["checks"]) == 12
    assert audit["quantized_modules"] == 14
    assert audit["kept_modules"] == ["lm_head"]
    assert audit["bytes"]["artifact"] == audit["bytes"]["expected"]
    assert audit["size_ratio"] == audit["bytes"]["artifact"] / audit["bytes"]["source"]
    assert 0.25 < audit["size_ratio"] < 0.65


def mixed(**more: Any) -> Quantize:
    overrides = [
        {"modules": ["re:.*down_proj$"], "scheme": "FP8_DYNAMIC"},
        {"modules": ["re:.*layers\\.1\\.self_attn"], "scheme": "NVFP4A16"},
        {"modules": ["re:.*o_proj$"], "scheme": "W4A16", "group_size": "channel"},
    ]
    given = {"method": "rtn", "scheme": "W4A16_ASYM", "group_size": 32, "overrides": overrides}
    return Quantize.model_validate_json(json.dumps(given | more))


def test_a_sound_mixed_artifact_with_a_kv_cache_passes(tmp_path: Path, source: Path) -> None:
    quantize = mixed(kv_cache="fp8")
    ours = write_quantized(tmp_path / "ours", llama_tensors(), quantize)
    write_weights(ours, quantized_tensors(llama_tensors(), quantize), shards=3)
    (ours / "model.safetensors").unlink()
    audit = audit_folder(source, ours, quantize)
    assert [check for check in audit["checks"] if not check["passed"]] == []
    assert (audit["quantized_modules"], audit["kept_modules"]) == (14, ["lm_head"])
    assert audit["bytes"]["artifact"] == audit["bytes"]["expected"]
    details = {check["name"]: check["detail"] for check in audit["checks"]}
    assert details["quantization_config"].startswith("mixed-precision, FP8_DYNAMIC, NVFP4A16, W4A")
    assert "at 4 bits" in details["quantized weights are the source's"]
    assert "at 8 bits" in details["quantized weights are the source's"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"group_0": None}, "group_3.weights.num_bits is 4, not 8 (model.layers.0.mlp.down_proj)"),
        ({"group_3": None}, "no config group names (model.layers.0"),
        ({"group_0": {"format": None}}, "group_0.format is None, not 'float-quantized'"),
        ({"group_0": {"input_activations": None}}, "input_activations is absent, not dynamic"),
        ({"group_3": {"input_activations": {"dynamic": False}}}, "is static, not None"),
        ({"group_1": {"targets": ["re:.*"]}}, "group_1.weights.strategy is 'tensor_group'"),
    ],
)
def test_config_groups_that_lie(
    source: Path, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    ours = write_quantized(tmp_path / "ours", llama_tensors(), mixed())
    config = json.loads((ours / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    for key, values in change.items():
        groups[key] = None if values is None else groups[key] | values
    config["config_groups"] = {key: group for key, group in groups.items() if group is not None}
    edit_json(ours / "config.json", {"quantization_config": config})
    found = failed(source, ours, mixed())
    assert found.keys() == {"quantization_config"}
    assert fault in found["quantization_config"]


def test_patterns_that_readers_take_in_another_order(source: Path, tmp_path: Path) -> None:
    """vLLM takes the first of those that match, compressed-tensors the first of the alphabet."""
    quantize = mixed()
    first, second, third = quantize.overrides
    other = quantize.model_copy(update={"overrides": (first, third, second)})
    ours = write_quantized(tmp_path / "ours", llama_tensors(), other)
    found = failed(source, ours, other)["quantization_config"]
    assert "group_2.weights.strategy is 'tensor_group', not 'channel'" in found
    assert "(model.layers.1.self_attn.o_proj)" in found and "group_1" not in found
    config = json.loads((ours / "config.json").read_text())["quantization_config"]
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]  # before any pattern
    config["config_groups"]["group_1"]["targets"] = names
    edit_json(ours / "config.json", {"quantization_config": config})
    assert failed(source, ours, other) == {}


def test_a_module_in_another_scheme_than_its_own(source: Path, tmp_path: Path) -> None:
    ours = write_quantized(tmp_path / "ours", llama_tensors(), ASYM)
    found = failed(source, ours, mixed())["every tensor accounted for"]
    assert "model.layers.0.mlp.down_proj.weight is missing" in found
    assert "model.layers.1.self_attn.k_proj.weight_global_scale is missing" in found


def test_kv_scales_are_there_exactly_when_asked_for(source: Path, tmp_path: Path) -> None:
    cached = ASYM.model_copy(update={"kv_cache": "fp8"})
    plain = write_quantized(tmp_path / "plain", llama_tensors(), ASYM)
    found = failed(source, plain, cached)
    scale = "model.layers.0.self_attn.k_scale"
    assert f"{scale} is missing" in found["every tensor accounted for"]
    assert "kv_cache_scheme.num_bits is None, not 8" in found["quantization_config"]
    ours = write_quantized(tmp_path / "ours", llama_tensors(), cached)
    assert failed(source, ours, cached) == {}
    found = failed(source, ours, ASYM)
    assert f"{scale} is not expected" in found["every tensor accounted for"]
    assert "does not ask for it" in found["quantization_config"]
    damage(ours, cached, **{scale: ("BF16", bf16(np.zeros(1)))})
    found = failed(source, ours, cached)
    assert found == {"scales are positive": f"{scale} has 1 of 1 not above 0"}
    damage(ours, cached, **{scale: ("BF16", bf16(np.ones(2)))})
    assert (
        f"{scale} is BF16 [2], not one"
        in failed(source, ours, cached)["every tensor accounted for"]
    )


def test_a_missing_and_an_unexpected_tensor(source: Path, ours: Path) -> None:
    damage(ours, **{f"{Q_PROJ}.weight_scale": None, "model.extra": ("F32", np.ones(3, "<f4"))})
    detail = failed(source, ours)["every tensor accounted for"]
    assert f"{Q_PROJ}.weight_scale is missing" in detail
    assert "model.extra is not expected" in detail


def test_a_module_that_was_not_quantized(source: Path, ours: Path) -> None:
    parts = {f"{Q_PROJ}.weight_{part}": None for part in ("packed", "scale", "shape", "zero_point")}
    whole = {f"{Q_PROJ}.weight": llama_tensors()[f"{Q_PROJ}.weight"]}
    damage(ours, **(parts | whole))
    detail = failed(source, ours)["every tensor accounted for"]
    assert f"{Q_PROJ}.weight_packed is missing: the module is not quantized" in detail
    assert f"{Q_PROJ}.weight is not expected" in detail


def test_nothing_quantized_at_all(source: Path, tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy")
    assert "something is quantized" in failed(source, copy)
    assert "quantization_config" in failed(source, copy)


def test_another_group_size_than_promised(source: Path, tmp_path: Path) -> None:
    other = Quantize(method="rtn", scheme="W4A16_ASYM", group_size=64)
    found = failed(source, write_quantized(tmp_path / "ours", llama_tensors(), other))
    assert "BF16 [64, 2], W4A16_ASYM promises BF16 [64, 4]" in found["every tensor accounted for"]
    assert "group_size is 64, not 32" in found["quantization_config"]


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_one_nan_or_infinity_in_bf16(source: Path, ours: Path, bits: int) -> None:
    values = llama_tensors()["lm_head.weight"][1].copy()
    values[5, 7] = bits
    damage(ours, **{"lm_head.weight": ("BF16", values)})
    found = failed(source, ours)
    assert f"lm_head.weight has 1 NaN or Inf of {values.size}" in found["no NaN or Inf"]


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_one_nan_in_fp8(source: Path, tmp_path: Path, bits: int) -> None:
    ours = write_quantized(tmp_path / "ours", llama_tensors(), FP8)
    values = quantized_tensors(llama_tensors(), FP8)[f"{Q_PROJ}.weight"][1].copy()
    values[0, 0] = bits
    damage(ours, FP8, **{f"{Q_PROJ}.weight": ("F8_E4M3", values)})
    assert f"{Q_PROJ}.weight has 1 NaN" in failed(source, ours, FP8)["no NaN or Inf"]


def test_not_finite_counts_by_bits() -> None:
    def count(values: list[float], dtype: str, code: str) -> int:
        return not_finite(np.array(values, code), dtype)

    assert count([1, np.inf, -np.inf, np.nan], "F32", "<f4") == 3
    assert count([1, np.inf, 65504], "F16", "<f2") == 1
    assert count([0x7E, 0xFE, 0x7F, 0xFF], "F8_E4M3", "u1") == 2
    assert count([0x7B, 0x7C, 0x7D, 0xFC], "F8_E5M2", "u1") == 3
    assert count([0x7F, 0xFF], "F8_E8M0", "u1") == 1
    assert count([0x7F7F, 0x7F80, 0xFFFF], "BF16", "<u2") == 2


@pytest.mark.parametrize("value", [0.0, -0.01])
def test_a_scale_that_is_not_positive(source: Path, ours: Path, value: float) -> None:
    scale = quantized_tensors(llama_tensors(), ASYM)[f"{Q_PROJ}.weight_scale"][1].copy()
    scale[3, 1] = bf16(np.array(value))
    damage(ours, **{f"{Q_PROJ}.weight_scale": ("BF16", scale)})
    found = failed(source, ours)["scales are positive"]
    assert f"{Q_PROJ}.weight_scale has 1 of {scale.size} not above 0" in found


def test_static_activations_need_a_positive_scale(source: Path, tmp_path: Path) -> None:
    ours = write_quantized(tmp_path / "ours", llama_tensors(), FP8)
    damage(ours, FP8, **{f"{Q_PROJ}.input_scale": ("BF16", bf16(np.zeros(1)))})
    assert f"{Q_PROJ}.input_scale" in failed(source, ours, FP8)["scales are positive"]


def test_a_weight_shape_that_lies(source: Path, ours: Path) -> None:
    damage(ours, **{f"{Q_PROJ}.weight_shape": ("I64", np.array([128, 64], "<i8"))})
    assert f"{Q_PROJ}.weight_shape" in failed(source, ours)["scales are positive"]


def test_one_changed_bit_in_an_unquantized_tensor(source: Path, ours: Path) -> None:
    values = llama_tensors()["model.embed_tokens.weight"][1].copy()
    values[9, 9] ^= 1
    damage(ours, **{"model.embed_tokens.weight": ("BF16", values)})
    found = failed(source, ours)["unquantized tensors are identical"]
    assert found == "model.embed_tokens.weight differs from the source"


def rescaled_by_awq(factor: float) -> dict[str, Any]:
    """Layer 0's first norm divided by a factor a channel, what reads it multiplied by it."""
    tensors = llama_tensors()
    factors = 2.0 ** np.random.default_rng(3).integers(-2, 3, 128) * factor
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = ("BF16", bf16(floats(tensors[norm][1]) / factors))
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        tensors[name] = ("BF16", bf16(floats(tensors[name][1]) * factors))
    return tensors


def test_awq_may_move_scales_into_norms_and_nobody_else(source: Path, tmp_path: Path) -> None:
    ours = write_quantized(tmp_path / "ours", rescaled_by_awq(1), ASYM)
    assert failed(source, ours, ASYM.model_copy(update={"method": "awq"})) == {}
    found = failed(source, ours, ASYM)
    assert "input_layernorm.weight differs" in found["unquantized tensors are identical"]


def test_awq_may_not_turn_a_norm_round(source: Path, tmp_path: Path) -> None:
    ours = write_quantized(tmp_path / "ours", rescaled_by_awq(-1), ASYM)
    found = failed(source, ours, ASYM.model_copy(update={"method": "awq"}))
    assert "unquantized tensors are identical" in found


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_the_weights_of_another_module(source: Path, ours: Path, method: str) -> None:
    quantized = quantized_tensors(llama_tensors(), ASYM)
    damage(
        ours,
        **{
            f"{Q_PROJ}.{part}": quantized[f"model.layers.1.self_attn.q_proj.{part}"]
            for part in ("weight_packed", "weight_scale", "weight_zero_point")
        },
    )
    found = failed(source, ours, ASYM.model_copy(update={"method": method}))
    assert found.keys() == {"quantized weights are the source's"}
    assert Q_PROJ in found["quantized weights are the source's"]


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_scale_that_is_wrong(source: Path, ours: Path, factor: float) -> None:
    scale = quantized_tensors(llama_tensors(), ASYM)[f"{Q_PROJ}.weight_scale"][1].copy()
    scale[3] = bf16(floats(scale[3]) * factor)
    damage(ours, **{f"{Q_PROJ}.weight_scale": ("BF16", scale)})
    found = failed(source, ours)
    assert found.keys() == {"quantized weights are the source's"}
    said = re.search(
        rf"{Q_PROJ}: row 3 is ([\d.]+) times", found["quantized weights are the source's"]
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(factor, rel=0.05)


def test_a_source_in_fp32_is_rounded_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    wide = {
        name: ("F32", (floats(bits) * (1 + generator.uniform(0, 1e-4, bits.shape))).astype("<f4"))
        for name, (_, bits) in llama_tensors().items()
    }
    source = write_checkpoint(tmp_path / "source", wide)
    narrow = {}
    for name, (_, values) in wide.items():
        below, half = values.view("<u4") >> 16, values.view("<u4") & 0xFFFF
        narrow[name] = ("BF16", (below + (half > 0x8000)).astype("<u2"))  # no ties among these
    ours = write_quantized(tmp_path / "ours", narrow, ASYM)
    assert failed(source, ours) == {}


def test_tied_embeddings_with_and_without_a_written_head(tmp_path: Path) -> None:
    tied, config = llama_tensors(tied=True), llama_config(tied=True)
    source = write_checkpoint(tmp_path / "source", tied, config)
    ours = write_quantized(tmp_path / "ours", tied, ASYM)
    edit_json(ours / "config.json", {"tie_word_embeddings": True})
    assert failed(source, ours) == {}
    copy = quantized_tensors(tied, ASYM)
    write_weights(ours, copy | {"lm_head.weight": tied["model.embed_tokens.weight"]})
    assert failed(source, ours) == {}
    write_weights(ours, copy | {"lm_head.weight": llama_tensors(seed=8)["lm_head.weight"]})
    assert "lm_head.weight differs" in failed(source, ours)["unquantized tensors are identical"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"format": "dense"}, "format is 'dense', not 'pack-quantized'"),
        ({"ignore": []}, "ignore lacks lm_head"),
        ({"config_groups": {}}, "no config_groups"),
    ],
)
def test_a_quantization_config_that_lies(
    source: Path, ours: Path, change: dict[str, Any], fault: str
) -> None:
    config = json.loads((ours / "config.json").read_text())
    edit_json(ours / "config.json", {"quantization_config": config["quantization_config"] | change})
    found = failed(source, ours)
    assert found.keys() == {"quantization_config"}
    assert fault in found["quantization_config"]


def test_a_model_config_that_changed(source: Path, ours: Path) -> None:
    moved = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}, "use_cache": True}
    edit_json(ours / "config.json", moved)
    assert failed(source, ours) == {}
    edit_json(ours / "config.json", {"rope_parameters": {"rope_theta": 5e5}, "eos_token_id": 3})
    detail = failed(source, ours)["model config"]
    assert "eos_token_id is 3, not 2" in detail
    assert "rope_theta 10000.0 became 500000.0" in detail


def test_tokenizer_template_and_generation_config(source: Path, ours: Path) -> None:
    edit_json(ours / "tokenizer.json", {"padding": {"strategy": "BatchLongest"}})
    assert failed(source, ours) == {}  # a caller's setting
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 1, "b": 0}}}
    edit_json(ours / "tokenizer.json", tokenizer)
    edit_json(ours / "tokenizer_config.json", {"chat_template": "other", "eos_token": "<eos>"})
    edit_json(ours / "generation_config.json", {"temperature": 1.0})
    (ours / "tokenizer.model").unlink()
    found = failed(source, ours)
    for part in (
        "tokenizer.json: model differs",
        "eos_token differs",
        "tokenizer.model is missing",
    ):
        assert part in found["tokenizer"]
    assert "temperature differs" in found["generation config"]
    assert found.keys() == {"tokenizer", "chat template", "generation config"}


def test_a_template_may_move_to_a_file_of_its_own(source: Path, ours: Path) -> None:
    template = json.loads((ours / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(ours / "tokenizer_config.json", {"chat_template": None})
    assert "chat template" in failed(source, ours)
    (ours / "chat_template.jinja").write_text(template)
    assert failed(source, ours) == {}


def test_a_generation_config_that_the_source_lacks(source: Path, ours: Path) -> None:
    (source / "generation_config.json").unlink()
    written = {"_from_model_config": True, "eos_token_id": 2, "transformers_version": "5"}
    write_json(ours / "generation_config.json", written)
    assert failed(source, ours) == {}
    edit_json(ours / "generation_config.json", {"temperature": 0.2})
    assert "temperature" in failed(source, ours)["generation config"]


def test_an_unreadable_artifact_fails_and_an_unreadable_source_raises(
    source: Path, ours: Path
) -> None:
    with (ours / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "truncated" in failed(source, ours)["the artifact can be read"]
    (source / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        audit_folder(source, ours, ASYM)


def run_stage(tmp_path: Path, source: Path, ours: Path) -> tuple[Any, list[str]]:
    store, lines = new_store(tmp_path), []
    fetched = artifact(store, "fetch", "f" * 64, {"source.json": {"folder": str(source)}})
    files = {f"model/{path.name}": path.read_bytes() for path in ours.iterdir()}
    compressed = artifact(store, "compress", "c" * 64, files)
    recipe = {
        "version": 1,
        "name": "tiny",
        "model": {"source": str(source)},
        "quantize": {"method": "rtn", "scheme": "W4A16_ASYM", "group_size": 32},
    }
    inputs = {"fetch": fetched, "compress": compressed}
    context = stage_context(tmp_path, store, "audit", inputs, recipe)
    context.runner = Runner(None, tmp_path, Progress(LineView(lines.append)))  # type: ignore[arg-type]
    try:
        stage.run(context)
    finally:
        assert stage.key_inputs(context.resolved, "audit")["group_size"] == 32
    return context, lines


def test_the_stage_writes_its_record(tmp_path: Path, source: Path, ours: Path) -> None:
    context, lines = run_stage(tmp_path, source, ours)
    audit = json.loads((context.files / "audit.json").read_text())
    assert all(check["passed"] for check in audit["checks"])
    assert any("reading tensors" in line for line in lines)
    parallel = audit["tensor_parallel"]
    assert list(parallel) == ["1", "2", "4", "8"]
    assert parallel["1"] == []
    assert any("attention heads" in fault for fault in parallel["8"])


def test_the_stage_names_what_failed(tmp_path: Path, source: Path, ours: Path) -> None:
    edit_json(ours / "generation_config.json", {"temperature": 1.0})
    with pytest.raises(ToolError) as error:
        run_stage(tmp_path, source, ours)
    assert "1 of 12 checks" in error.value.message
    assert "generation config: generation_config.json: temperature differs" in error.value.message
    assert json.loads((tmp_path / "work" / "audit.json").read_text())["quantized_modules"] == 14
    assert list((tmp_path / "files").iterdir()) == []
