"""The files of a Hugging Face checkpoint folder: which belong to it, what the small ones say."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.printable import shortened
from quantize.tensors import TensorInfo, read_header
from quantize.untrusted import (
    ARCHIVES,
    JSON_LIMIT_BYTES,
    foreign_link,
    front_matter,
    read_json_object,
    read_text,
    unreadable,
)

__all__ = [
    "CHECKPOINT_FILES",
    "any_match",
    "card_metadata",
    "chat_template",
    "checkpoint_files",
    "read_json_object",
    "read_weights",
    "unsound_files",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

IMATRIX = "imatrix.gguf"
"""llama.cpp's importance matrix: a GGUF file that is no model."""

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


FROM_ONE_COMMIT = "download the shards and the index again, from one commit"


def any_match(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file name fits one of the shell patterns, case-sensitively."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that belong to the checkpoint, sorted; no subfolders."""
    return [path.name for path in _named_as_checkpoint(folder) if path.is_file()]


def _named_as_checkpoint(folder: Path) -> list[Path]:
    """What stands under the names of a checkpoint's files, files or not."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    return [
        path
        for path in found
        if any_match(path.name, CHECKPOINT_FILES) and not any_match(path.name, FOREIGN_WEIGHTS)
    ]


def unsound_files(folder: Path, patterns: Sequence[str] = CHECKPOINT_FILES) -> list[Finding]:
    """Links that lead elsewhere, pipes and devices, and small files that are enormous.

    From the folder's own entries alone: no file is opened.
    """
    findings = []
    try:
        paths = [p for p in sorted(folder.iterdir()) if any_match(p.name, patterns)]
        for path in paths:
            target = foreign_link(path)
            if target is not None:
                findings.append(_link_finding(path, target))
            elif not path.is_file():
                what = "a folder" if path.is_dir() else "no regular file"
                findings.append(Finding(f"{path} is {what}", "remove it, or put the file there"))
            elif path.suffix != ".safetensors" and path.stat().st_size > JSON_LIMIT_BYTES:
                size = path.stat().st_size
                message = f"{path} has {size} bytes, far more than such a file has"
                findings.append(Finding(message, "look at what it is, and replace it"))
    except OSError as error:
        findings.append(Finding.of(unreadable(folder, error)))
    return findings


def _link_finding(path: Path, target: str) -> Finding:
    return Finding(
        f"{path} is a symbolic link to {target}, outside the checkpoint's folder",
        "links are not followed out of a folder: copy or hard-link the file, or name the folder "
        "that it is in",
    )


def chat_template(folder: Path) -> str | None:
    """The chat template (Jinja) that transformers would use, or None.

    `chat_template.jinja` goes before `chat_template.json`, that before `tokenizer_config.json`;
    of several named templates it is the one called `default`.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        template = read_json_object(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
        for entry in template if isinstance(template, list) else ():
            if isinstance(entry, dict) and entry.get("name") == "default":
                return str(entry.get("template", ""))
    return None


def is_weights(name: str) -> bool:
    """Whether a file of an artifact, or of what was published of it, holds the model's weights."""
    file = name.rpartition("/")[2]
    return file.endswith(".safetensors") or (file.endswith(".gguf") and file != IMATRIX)


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
    """The YAML front matter of the folder's README.md, scalars as text; empty without one."""
    path = folder / "README.md"
    return front_matter(path) if path.is_file() else {}


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
        name = shortened(tensor)
        if not isinstance(shard, str) or not _is_plain_name(shard):
            message = f"{path} puts {name} in {shortened(repr(shard))}, not in a file beside it"
            raise SourceError(message, FROM_ONE_COMMIT)
        if not shard.endswith(".safetensors"):
            message = f"{path} puts {name} in {shortened(shard)}, not a safetensors file"
            raise SourceError(message, FROM_ONE_COMMIT)
    return weight_map


def _is_plain_name(name: str) -> bool:
    """A file's own name: no path, nothing that a file system would refuse or read differently."""
    if name in ("", ".", ".."):
        return False
    return name.isprintable() and Path(name).name == name and "\\" not in name and len(name) < 256


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
            FROM_ONE_COMMIT,
        )
        for verb, names, why in faults
        if names
    ]


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{noun} {', '.join(map(shortened, names[:limit]))}{more}"


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
    if list(folder.glob("*.gguf")) + list(folder.glob("*.GGUF")):
        return Finding(
            f"{folder} holds GGUF weights, which are quantized already",
            "start from the safetensors checkpoint they were made from",
        )
    archives = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(ARCHIVES))
    if archives:
        return Finding(
            f"{folder} holds archives ({_listed(archives)}), which are not opened",
            "unpack them yourself, look at what is in them, and name that folder",
        )
    return Finding(f"no weights in {folder}: neither {WEIGHTS} nor {INDEX}", "copy them there")


def _listed(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
