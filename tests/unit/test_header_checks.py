"""Headers against config.json: what is missing, too much, or of another shape, in words."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import HIDDEN, bf16, edit_json, llama_config, llama_tensors, write_checkpoint

from quantize.architectures import FAMILIES, promised_tensors
from quantize.checkpoint import read_checkpoint
from quantize.header_checks import check_headers, notes_on_dtypes, promises_of


def found(folder: Path) -> str:
    """All findings on a checkpoint folder."""
    checkpoint = read_checkpoint(folder)
    promises = promises_of(checkpoint)
    assert promises is not None
    findings = check_headers(checkpoint, promises)
    assert all(finding.hint for finding in findings)
    return " | ".join(f"{finding.message} → {finding.hint}" for finding in findings)


def without(*endings: str) -> dict[str, Any]:
    return {n: v for n, v in llama_tensors().items() if not n.endswith(endings)}


def zeros(*shape: int) -> tuple[str, np.ndarray]:
    return "BF16", bf16(np.zeros(shape))


def test_a_sound_checkpoint(tmp_path: Path) -> None:
    assert found(write_checkpoint(tmp_path / "untied")) == ""
    tied = llama_tensors(tied=True), llama_config(tied=True)
    assert found(write_checkpoint(tmp_path / "tied", *tied)) == ""
    both = llama_tensors(), llama_config(tied=True)
    assert found(write_checkpoint(tmp_path / "both", *both)) == ""


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, without("norm.weight", "0.mlp.up_proj.weight"))
    said = found(folder)
    assert "6 tensors " in said  # two norms a layer, the last norm, one linear
    assert "and 3 more are not there, and LlamaForCausalLM needs them" in said
    assert "fill them at random" in said


def test_a_missing_head_may_be_a_tied_one(tmp_path: Path) -> None:
    said = found(write_checkpoint(tmp_path, without("lm_head.weight")))
    assert "tensor lm_head.weight is not there, and LlamaForCausalLM needs it" in said
    assert "tie_word_embeddings: False" in said  # what it was expected from
    assert "set tie_word_embeddings: true" in said


def test_tensors_without_a_place(tmp_path: Path) -> None:
    extra = {
        "v_head.summary.weight": zeros(1, HIDDEN),
        "model.layers.0.self_attn.q_proj.bias": zeros(HIDDEN),
        "model.layers.0.self_attn.rotary_emb.inv_freq": zeros(16),  # every loader computes it
    }
    said = found(write_checkpoint(tmp_path, llama_tensors() | extra))
    assert (
        "2 tensors model.layers.0.self_attn.q_proj.bias, v_head.summary.weight have no place"
        in said
    )
    assert "inv_freq" not in said


def test_wrong_shapes_name_the_keys(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", {"intermediate_size": 512})
    said = found(folder)
    assert "model.layers.0.mlp.gate_proj.weight has the shape [256, 128], not [512, 128]" in said
    assert "(and 5 more tensors), as config.json says (intermediate_size: 512" in said
    edit_json(folder / "config.json", {"intermediate_size": 256, "vocab_size": 90})
    assert "has the shape [96, 128], not [90, 128], as config.json says (vocab_size: 90" in found(
        folder
    )


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (3, "has no tensor of layer 2, and config.json says num_hidden_layers: 3"),
        (1, "has layers up to 1, and config.json says num_hidden_layers: 1"),
    ],
)
def test_layers_more_or_fewer(tmp_path: Path, layers: int, said: str) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", {"num_hidden_layers": layers})
    assert said in found(folder)
    assert " | " not in found(folder)  # not every tensor of the layer once more


def test_two_16_bit_formats_are_worth_a_note(tmp_path: Path) -> None:
    tensors = llama_tensors()
    norm = tensors["model.norm.weight"][1]
    tensors["model.norm.weight"] = ("F32", np.ones(len(norm), "<f4"))
    assert notes_on_dtypes(read_checkpoint(write_checkpoint(tmp_path / "norms", tensors))) == []
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = ("F16", np.zeros(tensors[name][1].shape, "<f2"))
    (note,) = notes_on_dtypes(read_checkpoint(write_checkpoint(tmp_path / "mixed", tensors)))
    assert "15 in BF16 and 1 in F16" in note


def test_what_the_table_cannot_tell() -> None:
    config = llama_config()
    assert promised_tensors("HeliumForCausalLM", config) is None
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        lacking = {name: value for name, value in config.items() if name != key}
        assert promised_tensors("LlamaForCausalLM", lacking) is None
        assert promised_tensors("LlamaForCausalLM", config | {key: "many"}) is None
    for strange in ({"head_dim": "wide"}, {"num_key_value_heads": [1]}):
        assert promised_tensors("LlamaForCausalLM", config | strange) is None


def test_every_family_has_a_place_for_each_layer() -> None:
    config = llama_config(layers=3) | {
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "num_local_experts": 2,
        "shared_expert_intermediate_size": 8,
    }
    for architecture in FAMILIES:
        promises = promised_tensors(architecture, config)
        assert promises is not None
        assert any(name.startswith("model.layers.2.") for name in promises)
        assert not any(name.startswith("model.layers.3.") for name in promises)


def test_experts_in_one_tensor() -> None:
    config = llama_config() | {"num_local_experts": 4}
    fused = promised_tensors("MixtralForCausalLM", config, fused_experts=True)
    assert fused is not None
    assert fused["model.layers.0.block_sparse_moe.experts.gate_up_proj"].shape == (4, 512, HIDDEN)
    apart = promised_tensors("MixtralForCausalLM", config)
    assert apart is not None
    assert apart["model.layers.1.block_sparse_moe.experts.3.w2.weight"].shape == (HIDDEN, 256)


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_a_config_may_promise_anything(tmp_path: Path, layers: int) -> None:
    """Told in seconds, without a name for each of a billion layers."""
    folder = write_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", {"num_hidden_layers": layers})
    started = time.process_time()
    said = found(folder)
    assert time.process_time() - started < 10
    assert f"no tensor of layer 2 and {layers - 3} more layers" in said
    assert "model.layers.2.input" not in said


def test_a_layer_whose_number_is_too_long_is_unknown(tmp_path: Path) -> None:
    name = f"model.layers.{'9' * 5000}.mlp.up_proj.weight"
    said = found(write_checkpoint(tmp_path / "model", llama_tensors() | {name: zeros(2, 2)}))
    assert "has no place in LlamaForCausalLM" in said
    assert len(said) < 1000


@pytest.mark.parametrize("strange", [{"decoder_sparse_step": "x"}, {"mlp_only_layers": 5}])
def test_sparse_steps_that_are_none(strange: dict[str, Any]) -> None:
    config = llama_config() | {"moe_intermediate_size": 8, "num_experts": 2, **strange}
    assert promised_tensors("Qwen3MoeForCausalLM", config)
