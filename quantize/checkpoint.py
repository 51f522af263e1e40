"""A Hugging Face checkpoint, read without loading weights and without running its code.

:func:`examine` finds everything that is wrong with a folder; :func:`read_checkpoint` raises it.
Only safetensors are read: pickled weights and checkpoints that bring Python code are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.findings import Finding, raise_findings
from quantize.model_files import (
    CHECKPOINT_FILES,
    card_metadata,
    chat_template,
    checkpoint_files,
    read_json_object,
    read_weights,
    unsound_files,
)
from quantize.printable import shortened
from quantize.remote_code import check_code
from quantize.store import Artifact
from quantize.tensors import TensorInfo, is_lfs_pointer
from quantize.untrusted import read_text, unreadable

__all__ = [
    "CHECKPOINT_FILES",
    "Checkpoint",
    "card_metadata",
    "chat_template",
    "checkpoint_files",
    "examine",
    "model_folder",
    "read_checkpoint",
]

JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "tekken.json", "chat_template.json", "generation_config.json"),
    "preprocessor_config.json",
)
"""Beside `config.json` and the index, which are read for what they say."""

EMBEDDING = re.compile(r"(^|\.)(embed\w*|\w+_embed|wte|wpe|\w*embeddings?)\.weight$")
LAYER = re.compile(r"(^|\.)(layers|h|blocks?)\.\d+\.")


QUANTIZATION_KEYS = ("quantization_config", "compression_config", "sparsity_config")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
PACKED = (
    *(".qweight", ".qzeros", ".g_idx"),  # GPTQ, AWQ
    *(".absmax", ".quant_map", ".SCB", ".quant_state.bitsandbytes__nf4"),  # bitsandbytes
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point"),  # FP8, INT
    *("_proj_blocks", "_proj_scales"),  # MXFP4, as gpt-oss has it
)
"""Ends of the names of tensors that only quantized checkpoints have."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with each other; the weights stay on disk."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]  # see checkpoint_files
    index: dict[str, str] = field(default_factory=dict)  # tensor → shard; empty for one file

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(info.elements for info in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without the files' headers."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The class that the config names, e.g. LlamaForCausalLM."""
        return str(self.config["architectures"][0])

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config, which multimodal models nest."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def dimension(self, name: str) -> int | None:
        """A whole number of the language model's config, or None where it does not state it."""
        value = self.text_config.get(name)
        return value if type(value) is int else None

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream."""
        return self.dimension("hidden_size")

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output projection is the embedding; where unstated, whether it is absent."""
        stated = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        return "lm_head.weight" not in self.tensors if stated is None else bool(stated)

    @property
    def has_chat_template(self) -> bool:
        """Whether `messages` can be rendered."""
        return chat_template(self.folder) is not None

    def linears(self) -> tuple[TensorInfo, ...]:
        """Weights (out_features, in_features) of linear modules: 2-D, and not an embedding."""
        return tuple(
            info
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2 and not EMBEDDING.search(name)
        )

    def layer_linears(self) -> tuple[TensorInfo, ...]:
        """Those of :meth:`linears` that belong to a numbered layer."""
        return tuple(info for info in self.linears() if LAYER.search(info.name))


def model_folder(artifact: Artifact) -> Path:
    """The checkpoint folder of a fetch or compress artifact."""
    if artifact.manifest.kind == "fetch":
        return artifact.path / str(artifact.json("source.json")["folder"])  # absolute stays so
    return artifact.path / "model"


def read_checkpoint(
    folder: Path, *, allow_quantized: bool = False, code: str | None = None
) -> Checkpoint:
    """Read a checkpoint's headers and JSON files; SourceError lists all that is wrong with it."""
    checkpoint, findings = examine(folder, allow_quantized=allow_quantized, code=code)
    if checkpoint is None:
        raise_findings(findings)
        raise AssertionError("no checkpoint and no finding")
    return checkpoint


def examine(
    folder: Path,
    *,
    allow_quantized: bool = False,
    code: str | None = None,
    commit: str | None = None,
) -> tuple[Checkpoint | None, list[Finding]]:
    """The checkpoint in `folder`, or None and everything that is wrong with it.

    `allow_quantized` is for our own artifacts, which are read with the same care. `code` is the
    recipe's pin of the checkpoint's Python, or :data:`quantize.remote_code.LET_IN`; `commit` that
    of the repository on the Hub which the folder comes from.
    """
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        return None, [Finding.of(unreadable(folder, error))]
    if not is_folder:
        what = "is not a folder" if exists else "does not exist"
        return None, [Finding(f"the checkpoint folder {folder} {what}", "correct model.source")]
    unsound = unsound_files(folder)
    if unsound:
        return None, unsound  # nothing is opened before they are gone
    files = checkpoint_files(folder)
    pointers, findings = _lfs_pointers(folder, files)
    findings += [
        Finding(
            f"{name} is a git-lfs pointer, not the file itself", f"run git lfs pull in {folder}"
        )
        for name in pointers
        if not name.endswith(".safetensors")  # those are named with the weights
    ]
    config: dict[str, Any] = {}
    if "config.json" not in pointers:
        try:
            config = _read_config(folder)
        except SourceError as error:
            findings.append(Finding.of(error))
    findings += check_code(folder, [name for name in files if name not in pointers], code, commit)
    findings += _small_file_findings(folder, [name for name in files if name not in pointers])
    findings += _tokenizer_findings(folder, files)
    tensors, index, weight_findings = read_weights(folder, files)
    findings += weight_findings
    if not allow_quantized:
        findings += _quantized_findings(folder, config, tensors)
    if findings:
        return None, findings
    return Checkpoint(folder, config, tensors, tuple(files), index), []


def _lfs_pointers(folder: Path, files: Sequence[str]) -> tuple[list[str], list[Finding]]:
    """Names of the files that git-lfs did not bring, and of those that cannot be opened."""
    pointers, findings = [], []
    for name in files:
        try:
            if is_lfs_pointer(folder / name):
                pointers.append(name)
        except SourceError as error:
            findings.append(Finding.of(error))
    return pointers, findings


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, which must name an architecture."""
    path = folder / "config.json"
    if not path.is_file():
        hint = "model.source must be a folder that transformers can load"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: name it in model.adapter, and its base in model.source"
        raise SourceError(f"no config.json in {folder}", hint)
    config = read_json_object(path)
    match config.get("architectures"):
        case [str(), *_]:
            return config
    raise SourceError(
        f"{path} names no architecture (architectures: "
        f"{shortened(repr(config.get('architectures')))})",
        'add it, e.g. "architectures": ["LlamaForCausalLM"]',
    )


def _small_file_findings(folder: Path, files: Sequence[str]) -> list[Finding]:
    """JSON that is none, text that is no UTF-8: tools would say so after hours, or crash."""
    findings = []
    for name in files:
        try:
            if name in JSON_FILES:
                read_json_object(folder / name)
            elif name.endswith((".jinja", ".txt")):
                read_text(folder / name)
            elif name == "README.md":
                card_metadata(folder)
        except SourceError as error:
            findings.append(Finding.of(error))
    return findings


def _tokenizer_findings(folder: Path, files: Sequence[str]) -> list[Finding]:
    if {"tokenizer.json", "tokenizer.model"} & set(files):
        return []
    if {"vocab.json", "merges.txt"} <= set(files):
        return []
    return [
        Finding(
            f"no tokenizer in {folder}: neither tokenizer.json nor tokenizer.model",
            "save it beside the weights: tokenizer.save_pretrained(folder)",
        )
    ]


def _quantized_findings(
    folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> list[Finding]:
    """Signs that the weights are not the BF16, FP16 or FP32 ones."""
    signs = [f"{key} in config.json{_method(value)}" for key, value in _quantization_blocks(config)]
    signs += [name for name in QUANTIZATION_FILES if (folder / name).is_file()]
    packed = sorted(name for name in tensors if name.endswith(PACKED))
    signs += [_first_of([shortened(packed[0])], packed)] if packed else []
    odd = sorted(
        f"{shortened(info.name)} is {info.dtype}"
        for info in tensors.values()
        if len(info.shape) >= 2 and info.dtype not in ("BF16", "F16", "F32")
    )
    signs += [_first_of(odd, odd)] if odd else []
    if not signs:
        return []
    return [
        Finding(
            f"the checkpoint in {folder} is already quantized ({'; '.join(signs)})",
            "start from the BF16 or FP16 checkpoint that it was made from",
        )
    ]


def _first_of(shown: Sequence[str], names: Sequence[str]) -> str:
    return shown[0] + (f", and {len(names) - 1} more tensors" if names[1:] else "")


def _quantization_blocks(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """`quantization_config` and its like, also of the language model inside a multimodal one."""
    nested = config.get("text_config")
    found = [(key, config[key]) for key in QUANTIZATION_KEYS if config.get(key) is not None]
    if isinstance(nested, dict):
        inside = [key for key in QUANTIZATION_KEYS if nested.get(key) is not None]
        found += [(f"text_config.{key}", nested[key]) for key in inside]
    return found


def _method(block: Any) -> str:
    method = block.get("quant_method") if isinstance(block, dict) else None
    return f": {shortened(str(method))}" if method else ""
