"""A LoRA adapter (PEFT), read without loading weights: its config and the header of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.model_files import TOKENIZER_FILES, read_json_object, unsound_files
from quantize.printable import shortened
from quantize.store import Artifact
from quantize.tensors import TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(\.weight)?"
    r"|token_adapter\.trainable_tokens_delta|(base_layer\.)?(weight|bias))"
)
_OUTER = re.compile(r"((language_)?model\.)+")


@dataclass(frozen=True)
class Adapter:
    """What `adapter_config.json` says, and the adapter's tensors by module and part.

    `modules` maps a module's name without the outer `model.` (as `bare`) to its tensors: `lora_A`
    (rank, in), `lora_B` (out, rank), `lora_bias` (out), `embedding_A` (rank, rows), `embedding_B`
    (width, rank), `magnitude` (DoRA), `tokens` (trained rows, width), and `weight` and `bias` that
    replace the base's. `strange` are names of no such form.
    """

    folder: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, TensorInfo]]
    strange: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        patterns = self.config.get("rank_pattern") or {}
        return max(int(rank) for rank in (self.config["r"], *patterns.values()))

    @property
    def targets(self) -> list[str]:
        """The last parts of its modules' names, sorted: down_proj, q_proj, ..."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    @property
    def trained_on(self) -> str | None:
        """What the adapter's config calls its base, if it does."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module: that of the first pattern it ends with, or r."""
        for pattern, rank in (self.config.get("rank_pattern") or {}).items():
            if re.fullmatch(_ending(pattern), module):
                return int(rank)
        return int(self.config["r"])

    def with_part(self, *parts: str) -> list[str]:
        """Names of the modules that have one of these parts."""
        return [name for name, found in self.modules.items() if set(parts) & set(found)]


def bare(module: str) -> str:
    """A module's name without the outer `model.` and `language_model.`, which libraries move."""
    return _OUTER.sub("", module, count=1) if _OUTER.match(module) else module


def read_adapter(folder: Path) -> tuple[Adapter | None, list[Finding]]:
    """The adapter in `folder`, or None and everything that keeps it from being read."""
    unsound = unsound_files(folder, (CONFIG, WEIGHTS, *TOKENIZER_FILES, "generation_config.json"))
    if unsound:
        return None, unsound
    if not (folder / CONFIG).is_file():
        return None, [_no_config(folder)]
    findings: list[Finding] = []
    config: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    try:
        config = read_json_object(folder / CONFIG)
    except SourceError as error:
        findings.append(Finding.of(error))
    if (folder / WEIGHTS).is_file():
        try:
            tensors = read_header(folder / WEIGHTS)
        except SourceError as error:
            findings.append(Finding.of(error))
    elif (folder / "adapter_model.bin").is_file():
        findings.append(
            Finding(
                f"the adapter in {folder} holds only pickled weights (adapter_model.bin)",
                "save it again with peft's save_pretrained, which writes safetensors",
            )
        )
    else:
        findings.append(Finding(f"no {WEIGHTS} in {folder}", "copy it there"))
    kind = config.get("peft_type")
    if config and kind != "LORA":
        findings.append(
            Finding(
                f"the adapter in {folder} is of type {shortened(str(kind))}, not LORA",
                "merge it with the tool that trained it, and name the result in model.source",
            )
        )
    elif config:
        findings += _bad_ranks(folder, config) + _bad_names(folder, config)
    if not findings and not tensors:
        findings.append(Finding(f"{folder / WEIGHTS} holds no tensors", "save the adapter again"))
    if findings:
        return None, findings
    modules, strange = _grouped(tensors)
    return Adapter(folder, config, modules, strange), []


def notice(adapter: Adapter, source: str) -> str | None:
    """What a person should know of the base that the adapter names; no error."""
    named = adapter.trained_on
    if (
        named is None
        or named.rstrip("/").rpartition("/")[2] == source.rstrip("/").rpartition("/")[2]
    ):
        return None
    quantized = re.search(r"bnb|[48]-?bit|gptq|awq", named, re.IGNORECASE)
    more = (
        "; it was trained on quantized weights, and is used with the full ones" if quantized else ""
    )
    return f"the adapter names {named} as its base, the recipe {source}{more}"


def _no_config(folder: Path) -> Finding:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = "model.adapter must be a folder that peft's save_pretrained wrote"
    if inside:
        hint = f"it holds several adapters: name one of them, e.g. {folder.name}/{inside[0]}"
    return Finding(f"no {CONFIG} in {folder}", hint)


def _bad_ranks(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        return [Finding(f"{folder / CONFIG}: rank_pattern is no mapping", "correct rank_pattern")]
    unclear = [pattern for pattern in patterns if not _compiles(_ending(pattern))]
    if unclear:
        what = shortened(unclear[0])
        message = f"{folder / CONFIG}: rank_pattern has {what!r}, which is no pattern"
        return [Finding(message, "correct rank_pattern")]
    ranks = [config.get("r"), *patterns.values()]
    bad = [rank for rank in ranks if type(rank) is not int or rank < 1]
    if not bad:
        return []
    message = (
        f"{folder / CONFIG} gives a rank of {shortened(repr(bad[0]))}, not a whole number above 0"
    )
    return [Finding(message, "correct r and rank_pattern")]


def _bad_names(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    """What names modules and layers: lists, or a pattern or a number where peft takes one."""

    def is_list(value: Any, kind: type) -> bool:
        return isinstance(value, list) and all(type(entry) is kind for entry in value)

    sound = {
        key: is_list(config.get(key), str)
        or (isinstance(config.get(key), str) and _compiles(config[key]))
        for key in ("target_modules", "exclude_modules")
    }
    layers = config.get("layers_to_transform")
    sound["layers_to_transform"] = type(layers) is int or is_list(layers, int)
    sound["modules_to_save"] = is_list(config.get("modules_to_save"), str)
    return [
        Finding(
            f"{folder / CONFIG}: {key} is {shortened(repr(config[key]))}, which names nothing",
            f"correct {key}, or save the adapter again",
        )
        for key, fine in sound.items()
        if config.get(key) is not None and not fine
    ]


def _ending(pattern: str) -> str:
    """A pattern of rank_pattern as peft applies it: to the end of a module's name."""
    return rf"(.*\.)?({pattern.removeprefix('^')})"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _grouped(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], tuple[str, ...]]:
    """Tensors by module and part, and the names of those that are neither."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            strange.append(name)
            continue
        part = found["part"].removeprefix("base_layer.")
        part = _PARTS.get(part, part)
        modules.setdefault(bare(found["module"]), {})[part] = info
    return modules, tuple(strange)


_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}


def adapter_folder(artifact: Artifact) -> Path:
    """The adapter in a fetch-adapter artifact."""
    return artifact.path / "adapter"


def tokenizer_folder(artifact: Artifact) -> Path | None:
    """Where its tokenizer is, if it brings one."""
    return adapter_folder(artifact) if artifact.json("adapter.json")["tokenizer"] else None
