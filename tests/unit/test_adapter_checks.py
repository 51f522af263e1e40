"""What is refused of an adapter before weights load, in both modes, and with which names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantize.adapter import bare, notice, read_adapter
from quantize.adapter_checks import HARMLESS, REFUSED, check_adapter
from quantize.checkpoint import read_checkpoint
from tests.unit.adapters import write_adapter
from tests.unit.checkpoints import (
    HIDDEN,
    VOCABULARY,
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_checkpoint,
    write_json,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = (VOCABULARY, HIDDEN)
MORE = (VOCABULARY + 2, HIDDEN)


def found(tmp_path: Path, mode: str = "merge", *, tied: bool = False, **given: Any) -> str:
    """All findings on an adapter for a fresh base, joined."""
    number = len(list(tmp_path.iterdir()))
    base = write_checkpoint(
        tmp_path / f"base{number}", llama_tensors(tied=tied), llama_config(tied=tied)
    )
    checkpoint = read_checkpoint(base)
    adapter = write_adapter(tmp_path / f"adapter{number}", checkpoint, **given)
    findings = check_adapter(adapter, mode, checkpoint)
    assert all(finding.hint for finding in findings)
    return " | ".join(finding.message for finding in findings)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "base"))

    def one(folder: Path) -> str:
        (finding,) = check_adapter(folder)
        return f"{finding.message} → {finding.hint}"

    assert "no adapter_config.json" in one(tmp_path / "base")
    assert "of type IA3, not LORA" in one(
        write_adapter(tmp_path / "ia3", checkpoint, peft_type="IA3")
    )
    pickled = write_adapter(tmp_path / "pickled", checkpoint)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "only pickled weights (adapter_model.bin)" in one(pickled)
    (pickled / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors" in one(pickled)
    cut = write_adapter(tmp_path / "cut", checkpoint)
    (cut / "adapter_model.safetensors").write_bytes(b"\x10")
    assert "not a valid safetensors file" in one(cut)
    empty = write_adapter(tmp_path / "empty", checkpoint)
    (empty / "adapter_model.safetensors").write_bytes(safetensors_bytes({}))
    assert "holds no tensors" in one(empty)
    assert "a rank of '4'" in one(write_adapter(tmp_path / "rank", checkpoint, r="4"))
    write_adapter(tmp_path / "several" / "second", checkpoint)
    assert "it holds several adapters: name one of them, e.g. several/second" in one(
        tmp_path / "several"
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"layers_to_transform": [1], "drop": r"layers\.0\."},
        {"layers_to_transform": 1, "drop": r"layers\.0\."},
        {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["v_proj"], "drop": "v_proj"},
        {"modules_to_save": ["lm_head"], "add": {HEAD: ROWS}},
        {"modules_to_save": ["embed_tokens", "lm_head"], "add": {EMBEDDING: MORE, HEAD: MORE}},
        {"add": {EMBEDDING: MORE, HEAD: MORE}},
        {"tied": True, "add": {EMBEDDING: MORE}},
        {"use_dora": True, "add": {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": [128]}},
    ],
)
def test_what_is_merged(tmp_path: Path, given: dict[str, Any]) -> None:
    assert found(tmp_path, **given) == ""


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "began as pissa_niter_16"),
        ({"init_lora_weights": "loftq"}, "began as loftq"),
        ({"init_lora_weights": "OLoRA"}, "began as OLoRA"),
        ({"alora_invocation_tokens": [5, 6]}, "sets alora_invocation_tokens: aLoRA acts on a part"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "sets target_parameters: LoRA on par"),
        ({"some_new_field": 3}, "sets some_new_field: this version does not know the field"),
        ({"task_type": "SEQ_CLS"}, "the adapter is for SEQ_CLS, not CAUSAL_LM"),
        ({"add": {"model.layers.0.mlp.experts.3.w1.lora_A.weight": [4, 8]}}, "LoRA on experts"),
        ({"add": {"model.layers.7.q_proj.lora_A.weight": [4, 8]}}, "has tensors for layers.7.q_pr"),
        (
            {"add": {"model.layers.0.mlp.odd": [4]}},
            "model.layers.0.mlp.odd, which the base has not",
        ),
        ({"r": 8}, "lora_A.weight is [4, 128], not [8, 128]"),
        ({"rank_pattern": {"v_proj": 2}}, "v_proj.lora_A.weight is [4, 128], not [2, 128]"),
        ({"drop": r"layers\.1\.self_attn\.q_proj"}, "target_modules names layers.1.self_attn.q_"),
        ({"drop": r"layers\.1\.self_attn\.q_proj\.lora_B"}, "has one of lora_A and lora_B only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, and the adapter has no"),
        (
            {"add": {EMBEDDING: MORE}},
            "adds 2 tokens and brings rows for embed_tokens alone: lm_head",
        ),
        (
            {"tied": True, "modules_to_save": ["embed_tokens"], "add": {EMBEDDING: MORE}},
            "lm_head has none for them",
        ),
        ({"add": {EMBEDDING: (90, HIDDEN)}}, "is [90, 128], not [96, 128]"),
        (
            {"lora_bias": True, "add": {"model.layers.0.self_attn.q_proj.lora_B.bias": [128]}},
            "q_proj has a bias in the adapter (lora_bias) and none in the base",
        ),
        ({"tied": True, "ensure_weight_tying": True}, "keeps embedding and head tied"),
    ],
)
def test_what_is_refused(tmp_path: Path, given: dict[str, Any], fault: str) -> None:
    assert fault in found(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"use_dora": True}, "it has DoRA (use_dora)"),
        ({"modules_to_save": ["lm_head"], "add": {HEAD: ROWS}}, "it has modules_to_save"),
        ({"bias": "all"}, "it has biases (bias: all)"),
        ({"lora_bias": True}, "it has biases of its own (lora_bias)"),
        ({"trainable_token_indices": [3]}, "it has trained tokens"),
        ({"add": {EMBEDDING: ROWS}}, "it has whole weights (embed_tokens)"),
        (
            {"add": {"lm_head.lora_A.weight": (4, HIDDEN), "lm_head.lora_B.weight": (96, 4)}},
            "it has LoRA outside the layers (lm_head)",
        ),
        ({"r": 1024}, "it has rank 1024, above 512"),
        ({"target_modules": None}, "vLLM wants target_modules in adapter_config.json"),
    ],
)
def test_what_vllm_does_not_serve_apart(tmp_path: Path, given: dict[str, Any], fault: str) -> None:
    assert fault in found(tmp_path, "separate", **given)
    assert found(tmp_path, "separate") == ""


def test_every_field_of_peft_is_known_once() -> None:
    assert not HARMLESS & set(REFUSED)


def test_names_and_ranks(tmp_path: Path) -> None:
    for name in (
        "model.layers.0.x",
        "model.language_model.layers.0.x",
        "language_model.model.layers.0.x",
    ):
        assert bare(name) == "layers.0.x"
    assert bare("lm_head") == "lm_head"
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "base"))
    folder = write_adapter(
        tmp_path / "adapter", checkpoint, rank_pattern={"v_proj": 16, "layers.0.mlp.down_proj": 2}
    )
    adapter, _ = read_adapter(folder)
    assert adapter is not None
    assert adapter.rank == 16
    assert [adapter.rank_of(f"layers.{n}.mlp.down_proj") for n in (0, 1)] == [2, 4]
    assert adapter.rank_of("layers.1.self_attn.v_proj") == 16


def test_another_base_is_worth_a_notice(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "base"))
    folder = write_adapter(tmp_path / "adapter", checkpoint)

    def said(named: object, source: str = "models/checkpoint/") -> str | None:
        write_json(
            folder / "adapter_config.json",
            {"peft_type": "LORA", "r": 4, "base_model_name_or_path": named},
        )
        adapter, _ = read_adapter(folder)
        assert adapter is not None
        return notice(adapter, source)

    assert said(None) is None
    assert said("/home/ann/checkpoint") is None
    assert (
        said("acme/other-8b")
        == "the adapter names acme/other-8b as its base, the recipe models/checkpoint/"
    )
    assert "trained on quantized weights" in (said("unsloth/llama-3-8b-bnb-4bit") or "")
