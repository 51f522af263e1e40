"""The audit of GGUF: files written by the specification, each spoilt in one way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from checkpoints import floats, llama_tensors, safetensors_bytes

from quantize.checkpoint import read_checkpoint
from quantize.gguf.against_bf16 import check_quantized
from quantize.gguf.against_source import check_converted
from quantize.gguf.file import read_gguf
from quantize.gguf.types import FALLBACK, GGUF_TYPES, allowed_formats, bits_on_llama

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
TOKENS = [f"t{index}" for index in range(96)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
Values = dict[str, np.ndarray]


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        if name.endswith(theirs):
            layer = name.split(".")[2] if ".layers." in name else None
            return ours if layer is None else f"blk.{layer}.{ours}"
    raise KeyError(name)


class Case:
    """A checkpoint, its BF16 file and its Q8_0 file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        tensors = llama_tensors()
        (self.source / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        self.write("config.json", {"architectures": ["LlamaForCausalLM"], "vocab_size": 96})
        vocabulary = {token: index for index, token in enumerate(TOKENS)}
        model = {"type": "BPE", "byte_fallback": True, "vocab": vocabulary}
        self.write("tokenizer.json", {"model": model, "added_tokens": []})
        self.write("tokenizer_config.json", {"eos_token": "t5", "chat_template": TEMPLATE})
        self.values: Values = {renamed(name): floats(bits) for name, (_, bits) in tensors.items()}
        for name, values in self.values.items():
            if name.endswith("attn_q.weight"):  # as the converter reorders rows for its rotation
                self.values[name] = np.concatenate([values[::2], values[1::2]])
        self.metadata: dict[str, Any] = {
            "general.architecture": "llama",
            "general.file_type": 32,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.eos_token_id": 5,
            "tokenizer.chat_template": TEMPLATE,
        }
        self.made_metadata = self.metadata | {"general.file_type": 7}
        self.made = {name: self.quantized(name, values) for name, values in self.values.items()}

    def write(self, name: str, value: Any) -> None:
        (self.source / name).write_text(json.dumps(value))

    def quantized(self, name: str, values: np.ndarray) -> gguf_files.Tensor:
        return gguf_files.f32(values) if values.ndim == 1 else gguf_files.q8_0(values)

    def converted(self) -> Path:
        tensors = {
            name: gguf_files.f32(values) if values.ndim == 1 else gguf_files.bf16(values)
            for name, values in self.values.items()
        }
        return gguf_files.write(self.folder / "BF16.gguf", self.metadata, tensors)

    def faults(self) -> dict[str, str]:
        """Name → detail of the checks that failed."""
        source = read_checkpoint(self.source)
        converted = read_gguf(self.converted())
        made = read_gguf(gguf_files.write(self.folder / "made.gguf", self.made_metadata, self.made))
        checks = check_converted(source, converted, lambda _: None)
        checks += check_quantized(converted, made, "Q8_0", lambda _: None)
        return {check.name: check.detail for check in checks if not check.passed}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_sound_file_passes(case: Case) -> None:
    assert case.faults() == {}


def value_changed(case: Case) -> None:
    case.values["blk.1.ffn_down.weight"] = case.values["blk.1.ffn_down.weight"].copy()
    case.values["blk.1.ffn_down.weight"][3, 4] *= 2
    case.made["blk.1.ffn_down.weight"] = gguf_files.q8_0(case.values["blk.1.ffn_down.weight"])


def columns_moved(case: Case) -> None:
    values = case.values["blk.0.ffn_up.weight"][:, ::-1].copy()
    case.values["blk.0.ffn_up.weight"] = values
    case.made["blk.0.ffn_up.weight"] = gguf_files.q8_0(values)


def row_repeated(case: Case) -> None:
    values = case.values["token_embd.weight"].copy()
    values[1] = values[0]
    case.values["token_embd.weight"] = values
    case.made["token_embd.weight"] = gguf_files.q8_0(values)


def norm_changed(case: Case) -> None:
    case.values["output_norm.weight"] = case.values["output_norm.weight"] + 1
    case.made["output_norm.weight"] = gguf_files.f32(case.values["output_norm.weight"])


def another_tensors_weights(case: Case) -> None:
    case.made["blk.0.ffn_up.weight"] = gguf_files.q8_0(case.values["blk.1.ffn_up.weight"])


def scale_is_infinite(case: Case) -> None:
    kind, shape, raw = case.made["blk.0.attn_k.weight"]
    case.made["blk.0.attn_k.weight"] = kind, shape, b"\x00\x7c" + raw[2:]


def left_unquantized(case: Case) -> None:
    case.made["blk.0.ffn_up.weight"] = gguf_files.bf16(case.values["blk.0.ffn_up.weight"])


def lost(case: Case) -> None:
    del case.made["blk.1.attn_v.weight"]


def norm_touched(case: Case) -> None:
    case.made["output_norm.weight"] = gguf_files.f32(case.values["output_norm.weight"] * 1.01)


def other_template(case: Case) -> None:
    case.metadata["tokenizer.chat_template"] = TEMPLATE + " "
    case.made_metadata["tokenizer.chat_template"] = TEMPLATE + " "


def other_token(case: Case) -> None:
    case.metadata["tokenizer.ggml.eos_token_id"] = 6
    case.made_metadata["tokenizer.ggml.eos_token_id"] = 6


def other_vocabulary(case: Case) -> None:
    tokens = [*TOKENS[:-1], "x"]
    case.metadata["tokenizer.ggml.tokens"] = tokens
    case.made_metadata["tokenizer.ggml.tokens"] = tokens


def other_kind(case: Case) -> None:
    case.metadata["tokenizer.ggml.model"] = "gpt2"
    case.made_metadata["tokenizer.ggml.model"] = "gpt2"


def fewer_tokens(case: Case) -> None:
    case.metadata["tokenizer.ggml.tokens"] = TOKENS[:-1]
    case.made_metadata["tokenizer.ggml.tokens"] = TOKENS[:-1]


def metadata_lost(case: Case) -> None:
    del case.made_metadata["tokenizer.chat_template"]


def other_type(case: Case) -> None:
    case.made_metadata["general.file_type"] = 15


BF16, FIDELITY = "BF16 weights are the source's", "quantized weights are the BF16 file's"
SPOILT: list[tuple[Callable[[Case], None], str, str]] = [
    (value_changed, BF16, "20 of 21"),
    (columns_moved, BF16, "model.layers.0.mlp.up_proj.weight"),
    (row_repeated, BF16, "model.embed_tokens.weight"),
    (norm_changed, BF16, "model.norm.weight"),
    (another_tensors_weights, FIDELITY, "blk.0.ffn_up.weight (Q8_0): cosine"),
    (scale_is_infinite, "no NaN or Inf", "blk.0.attn_k.weight has 1"),
    (left_unquantized, "number formats of Q8_0", "blk.0.ffn_up.weight is not quantized (BF16)"),
    (lost, "every tensor is accounted for", "blk.1.attn_v.weight is missing"),
    (norm_touched, FIDELITY, "output_norm.weight differs"),
    (other_template, "chat template", "differs"),
    (other_token, "special tokens", "eos_token is 't6', the source's is 't5'"),
    (other_vocabulary, "tokenizer", "1 tokens have other texts, the first is 95"),
    (other_kind, "tokenizer", "its kind is gpt2, the source's is llama"),
    (fewer_tokens, "tokenizer", "95 tokens"),
    (metadata_lost, "metadata", "tokenizer.chat_template differs"),
    (other_type, "metadata", "general.file_type is 15, not 7"),
]


@pytest.mark.parametrize(
    ("spoil", "check", "detail"), SPOILT, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_fault_is_found(
    spoil: Callable[[Case], None], check: str, detail: str, case: Case
) -> None:
    spoil(case)
    faults = case.faults()
    assert check in faults
    assert detail in faults[check]


def test_what_another_architectures_converter_computes_is_said(case: Case) -> None:
    case.write("config.json", {"architectures": ["OtherForCausalLM"], "vocab_size": 96})
    norm_changed(case)
    assert case.faults() == {}
    source, converted = read_checkpoint(case.source), read_gguf(case.converted())
    first = check_converted(source, converted, lambda _: None)[0]
    assert "20 of 21" in first.detail and "changed by the converter: model.norm" in first.detail


def test_gemmas_norms_are_one_more(case: Case) -> None:
    case.write("config.json", {"architectures": ["Gemma2ForCausalLM"], "vocab_size": 96})
    for name, values in case.values.items():
        if values.ndim == 1:
            case.values[name] = values + np.float32(1)
    source, converted = read_checkpoint(case.source), read_gguf(case.converted())
    first = check_converted(source, converted, lambda _: None)[0]
    assert "21 of 21" in first.detail


def test_every_type_has_its_formats() -> None:
    for scheme, found in GGUF_TYPES.items():
        assert found.main in allowed_formats(scheme)
        assert FALLBACK.get(found.main, found.main) in allowed_formats(scheme)
        assert 2 < bits_on_llama(scheme) < 9
