"""Who may quantize what: recipes, configs and shapes that an engine refuses, before work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json, llama_config, llama_tensors, recipe, write_checkpoint

from quantize.checkpoint import read_checkpoint
from quantize.engine.config4 import NotTheSame, for_transformers_4
from quantize.engine_checks import check_engine
from quantize.engines import ENGINES, OLD_NAMES
from quantize.quantization import Quantize


def quantize(**values: Any) -> Quantize:
    return Quantize.model_validate(values)


AWQ = {"method": "awq", "engine": "autoawq"}
GPTQ = {"method": "gptq", "engine": "gptqmodel"}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_name_is_accepted_with_a_notice(name: str) -> None:
    made = quantize(method="gptq", engine=name)
    assert made.engine == "gptqmodel"
    (notice,) = made.notices
    assert f"{name} is the old name" in notice
    assert "write gptqmodel" in notice
    assert "engine" in made.model_dump() and name not in str(made.model_dump())


def test_no_notice_without_an_old_name() -> None:
    assert quantize(**GPTQ).notices == ()
    assert quantize(method="gptq").notices == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (AWQ | {"scheme": "W4A16"}, "of engine autoawq cannot produce W4A16: use W4A16_ASYM"),
        (AWQ | {"group_size": "channel"}, "group_size channel (it has 32, 64 and 128)"),
        (AWQ | {"group_size": 256}, "group_size 256"),
        (AWQ | {"ignore": ()}, "lm_head, which ignore does not name"),
        (AWQ | {"kv_cache": "fp8"}, "cannot do kv_cache"),
        (AWQ | {"clip": True}, "cannot do clip as an option (it always clips)"),
        ({"method": "awq", "engine": "llmcompressor", "clip": True}, "clip (its AWQ has none)"),
        ({"method": "awq+gptq", "clip": True}, "clip with method awq+gptq: method awq alone clips"),
        (GPTQ | {"ignore": ()}, "lm_head, which ignore does not name"),
        (GPTQ | {"group_size": 96}, "group_size 96"),
        (GPTQ | {"activation_order": "weight"}, "activation_order weight, which vLLM no longer"),
        (GPTQ | {"group_size": "channel"}, "activation_order static with group_size channel"),
        (GPTQ | {"scheme": "W8A8"}, "cannot produce W8A8"),
        (GPTQ | {"method": "awq"}, "engine gptqmodel has no method awq"),
        ({"method": "autoround"}, "no engine makes method autoround"),
    ],
)
def test_what_an_engine_cannot_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        quantize(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        AWQ,
        AWQ | {"group_size": 32, "ignore": ("re:.*lm_head",)},
        GPTQ | {"scheme": "W4A16_ASYM"},
        GPTQ | {"scheme": "W8A16", "activation_order": "none"},
        GPTQ | {"group_size": "channel", "activation_order": "none"},
    ],
)
def test_what_an_engine_can_do(values: dict[str, Any]) -> None:
    assert quantize(**values).engine == values["engine"]


@pytest.mark.parametrize("engine", ["autoawq", "gptqmodel"])
def test_models_that_an_engine_cannot_read(engine: str) -> None:
    cannot_read = ENGINES[engine].cannot_read
    assert cannot_read(llama_config()) is None
    assert "own code" in str(cannot_read(llama_config() | {"auto_map": {"AutoConfig": "a.B"}}))
    assert "not in its table" in str(cannot_read({"model_type": "gemma9"}))
    assert "model type None" in str(cannot_read({}))


def test_autoawq_reads_what_its_transformers_can_make() -> None:
    rope: dict[str, Any] = {"full_attention": {"rope_theta": 1e4}}
    layered = llama_config() | {"rope_parameters": rope}
    assert "differ from layer to layer" in str(ENGINES["autoawq"].cannot_read(layered))
    assert ENGINES["gptqmodel"].cannot_read(layered) is None


def test_an_older_config_says_the_same() -> None:
    old = {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    assert for_transformers_4(old) == old
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert for_transformers_4({"model_type": "llama"} | plain) == old
    scaled = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "partial_rotary_factor": 0.5}
    assert for_transformers_4({"rope_parameters": scaled}) == {
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "types"),
    [
        ({"model_type": "llama"}, [FULL, FULL]),
        ({"model_type": "gemma2"}, [SLIDING, FULL, SLIDING]),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            [FULL, SLIDING],
        ),
    ],
)
def test_kinds_of_layers_that_the_older_models_have(
    config: dict[str, Any], types: list[str]
) -> None:
    assert for_transformers_4(config | {"layer_types": types}) == config
    with pytest.raises(NotTheSame):
        for_transformers_4(config | {"layer_types": [*types[:-1], "linear_attention"]})


def said_of(folder: Path, **values: Any) -> str:
    made = recipe(quantize=values)
    found = check_engine(read_checkpoint(folder), made)
    return " | ".join(f"{finding.message} → {finding.hint}" for finding in found)


def test_the_check_names_engine_reason_and_remedy(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    for values in (AWQ, GPTQ, {"method": "awq"}):
        assert said_of(folder, **values, group_size=32) == ""
    edit_json(folder / "config.json", {"model_type": "smol"})
    said = said_of(folder, **AWQ, group_size=32)
    assert said.startswith("engine autoawq cannot take this checkpoint: model type smol is not")
    assert said.endswith("→ use engine stream")
    assert said_of(folder, method="awq", group_size=32) == ""


def test_clipping_is_not_left_to_an_engine_without_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert said_of(folder, method="awq", group_size=32, clip=True) == ""
    edit_json(folder / "config.json", {"architectures": ["SmolForCausalLM"]})
    said = said_of(folder, method="awq", group_size=32, clip=True)
    assert said == (
        "quantize.clip: the streaming engine is not verified on SmolForCausalLM, and "
        "llm-compressor's AWQ does not clip → remove quantize.clip"
    )
    assert said_of(folder, method="awq", group_size=32) == ""


def test_shapes_that_cannot_be_packed(tmp_path: Path) -> None:
    tensors = llama_tensors()
    dtype, up = tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = dtype, up[:200]  # of 256 rows
    folder = write_checkpoint(tmp_path, tensors, llama_config())
    said = said_of(folder, **AWQ, group_size=32)
    assert "engine autoawq needs whole parts of 64 outputs, unlike" in said
    assert "up_proj.weight [200, 128]" in said
    assert "or add these modules to quantize.ignore" in said
    said = said_of(folder, **GPTQ, group_size=32)
    assert "needs whole parts of 32 inputs and outputs" in said
    left = ["lm_head", "model.layers.0.mlp.up_proj"]
    assert said_of(folder, **AWQ, group_size=32, ignore=left) == ""


def test_names_that_autoawq_does_not_clip() -> None:
    from quantize.engines.autoawq import cannot_hold

    assert cannot_hold("model.layers.0.self_attn.k_proj", (8, 128)) is None
    assert cannot_hold("model.layers.0.self_attn.v_proj", (8, 128)) is not None
    assert cannot_hold("model.layers.0.self_attn.k_proj", (12, 128)) is not None
