"""The files of a Hugging Face checkpoint folder: which belong to it, what the small ones say."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.tensors import TensorInfo, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "README.md",
    "LICENSE*",
)
"""Patterns of the file names that belong to a checkpoint; everything else is left alone."""

SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)

FOREIGN_WEIGHTS = ("consolidated*.safetensors",)
"""The same weights once more in the vendor's own layout, which no Hugging Face loader reads."""

CODE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py", "processing_*.py")

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def any_match(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file name fits one of the shell patterns, case-sensitively."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that belong to the checkpoint, sorted; no subfolders."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if any_match(path.name, CHECKPOINT_FILES)
        and not any_match(path.name, FOREIGN_WEIGHTS)
        and path.is_file()
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; SourceError names the file and the line of a mistake."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}", "correct or replace it") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}, not a JSON object", "replace it")
    return value


def chat_template(folder: Path) -> str | None:
    """The chat template (Jinja) that transformers would use, or None.

    `chat_template.jinja` goes before `chat_template.json`, that before `tokenizer_config.json`;
    of several named templates it is the one called `default`.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        template = read_json_object(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
        for entry in template if isinstance(template, list) else ():
            if isinstance(entry, dict) and entry.get("name") == "default":
                return str(entry["template"])
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that the tokenizer's config names, e.g. `eos_token`, each as text."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        stated = read_json_object(folder / file) if (folder / file).is_file() else {}
        for name in SPECIAL_TOKENS:
            value = stated.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                found[name] = value
    return found


def card_metadata(folder: Path) -> dict[str, Any]:
    """The YAML front matter of the folder's README.md; empty without one.

    Every scalar stays a string: YAML would read the language code `no` as false.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)])
    try:
        value = yaml.load(text, Loader=yaml.BaseLoader)  # builds strings, lists and dicts only
    except yaml.YAMLError as error:
        raise SourceError(
            f"the front matter of {path} is not valid YAML: {error}", "correct or remove it"
        ) from error
    return value if isinstance(value, dict) else {}


def read_weights(
    folder: Path, files: Sequence[str]
) -> tuple[dict[str, TensorInfo], dict[str, str], list[Finding]]:
    """Tensors of all shards, the index (tensor → shard; empty for one file), what is wrong.

    The index and the shards are held against each other in both directions. A model.safetensors
    beside an index that does not name it is an error: transformers would load the one, vLLM the
    other.
    """
    present = [name for name in files if name.endswith(".safetensors")]
    if INDEX in files:
        try:
            index = _read_index(folder / INDEX)
        except SourceError as error:
            return {}, {}, [Finding.of(error)]
        wanted, authority = sorted(set(index.values())), INDEX
    elif WEIGHTS in present:
        index, wanted, authority = {}, [WEIGHTS], WEIGHTS
    else:
        return {}, {}, [_no_weights(folder, present)]
    findings = [
        Finding(f"{name} is missing: {INDEX} names it", "download or copy it again")
        for name in wanted
        if name not in present
    ]
    findings += [
        Finding(
            f"{name} belongs to no part of the checkpoint: {authority} does not account for it",
            "remove it from the folder, or write a complete index",
        )
        for name in present
        if name not in wanted
    ]
    tensors: dict[str, TensorInfo] = {}
    for name in (name for name in wanted if name in present):
        try:
            header = read_header(folder / name)
        except SourceError as error:
            findings.append(Finding.of(error))
            continue
        findings += _index_findings(name, header, index, tensors)
        tensors |= header
    return tensors, index, findings


def _read_index(path: Path) -> dict[str, str]:
    """`weight_map`: tensor → shard's file name, with no path in it."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path} has no weight_map", "download it again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise SourceError(f"{path} puts {tensor} in {shard!r}, not in a file beside it", "")
        if not shard.endswith(".safetensors"):
            raise SourceError(f"{path} puts {tensor} in {shard}, not a safetensors file", "")
    return weight_map


def _index_findings(
    shard: str,
    header: dict[str, TensorInfo],
    index: dict[str, str],
    before: dict[str, TensorInfo],
) -> list[Finding]:
    """Tensors that the index and one shard do not agree on, or that an earlier shard had."""
    if not index:
        return []
    absent = sorted(name for name, file in index.items() if file == shard and name not in header)
    extra = sorted(name for name in header if index.get(name) != shard)
    twice = sorted(name for name in header if name in before)
    faults = (
        ("lacks", absent, f"which {INDEX} puts there"),
        ("has", extra, f"which {INDEX} does not put there"),
        ("has", twice, "which an earlier shard has, too"),
    )
    return [
        Finding(
            f"{shard} {verb} {_some(names)}, {why}",
            "download the shards and the index again, from one commit",
        )
        for verb, names, why in faults
        if names
    ]


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{noun} {', '.join(names[:limit])}{more}"


def _no_weights(folder: Path, present: Sequence[str]) -> Finding:
    if present:
        return Finding(
            f"{folder} has {present[0]}{' and others' if present[1:] else ''} but neither "
            f"{WEIGHTS} nor {INDEX}",
            f"add {INDEX}, or rename a single file to {WEIGHTS}",
        )
    pickled = sorted(path.name for path in folder.iterdir() if any_match(path.name, PICKLED))
    if pickled:
        return Finding(
            f"{folder} holds only pickled weights ({_listed(pickled)}); loading them would run "
            "code from the file",
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), and save the tokenizer beside them",
        )
    if list(folder.glob("*.gguf")):
        return Finding(
            f"{folder} holds GGUF weights, which are quantized already",
            "start from the safetensors checkpoint they were made from",
        )
    return Finding(f"no weights in {folder}: neither {WEIGHTS} nor {INDEX}", "copy them there")


def _listed(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
