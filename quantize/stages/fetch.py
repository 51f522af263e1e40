"""Fetch: the checkpoint that everything else starts from, pinned and hashed.

As stage `fetch-base` the model that was fine-tuned, for retention: as it is, without an adapter.

A local folder is referenced in place, a Hub repository is downloaded into `model/`, and a base
with a LoRA adapter is merged in BF16 into `model/`, unless the recipe keeps the adapter apart.
Writes `source.json`::

    {"kind": "folder" | "hub" | "merged", "folder": absolute path or "model",
     "repo", "commit",                    # Hub only
     "adapter": {"source", "commit", "merged_modules"},  # merged only; commit on the Hub only
     "merge_check": {...},                # merged only, see quantize/workers/merge_check.py
     "files": [{"name", "bytes", "sha256"}],
     "parameters": int, "weight_bytes": int, "architecture": str, "tied_embeddings": bool,
     "license", "languages", "base_model",  # as the source's card says, where it does
     "licence_terms": {"license_name", "license_link", "extra_gated_...": text},  # likewise
     "attention": {"layers", "kv_heads", "head_size"} or why it cannot be told,  # for the KV cache
     "positions": int,  # max_position_embeddings, where the config has it
     "chat_template": bool}
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.adapter import notice, read_adapter
from quantize.adapter_checks import check_adapter
from quantize.capacity import attention
from quantize.checkpoint import (
    Checkpoint,
    card_metadata,
    chat_template,
    examine,
    read_checkpoint,
)
from quantize.errors import ResourceError, SourceError
from quantize.findings import raise_findings
from quantize.keys import digest, file_sha256, tree_sha256
from quantize.model_files import (
    CHECKPOINT_FILES,
    FOREIGN_WEIGHTS,
    PICKLED,
    TOKENIZER_FILES,
    any_match,
    checkpoint_files,
)
from quantize.protocol import write_json
from quantize.remote_code import LET_IN
from quantize.source_checks import check_checkpoint
from quantize.stages.base import Resolved, StageContext
from quantize.store import Artifact, FileEntry
from quantize.weights import hash_and_look

VERSION = 2
TERMS = (
    "license_name",
    "license_link",
    "extra_gated_heading",
    "extra_gated_prompt",
    "extra_gated_button_content",
)
"""What the front matter of a source's card says of its licence and of the terms one agrees to."""

BASE = "fetch-base"
"""Id of the stage that brings `model.base`."""

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    *TOKENIZER_FILES,
    "generation_config.json",
)
TAKEN_FROM_ADAPTER = (*TOKENIZER_FILES, "generation_config.json")


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """Merging needs peft, which comes with llm-compressor."""
    merges = entry_id != BASE and resolved.recipe.model.merges
    return ("llmcompressor",) if merges else ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The contents of the checkpoint, and of the adapter with the tokenizer it brings."""
    if entry_id == BASE:
        return {"base": resolved.digests["base"]}
    inputs: dict[str, Any] = {"model": resolved.digests["model"]}
    if resolved.recipe.model.trust_remote_code is not None:
        inputs["trust_remote_code"] = resolved.recipe.model.trust_remote_code
    if resolved.recipe.model.merges:
        inputs |= adapter_inputs(resolved)
    return inputs


def adapter_inputs(resolved: Resolved) -> dict[str, Any]:
    """The contents of the adapter, and of the tokenizer files that lie beside it."""
    inputs: dict[str, Any] = {"adapter": resolved.digests["adapter"]}
    folder = resolved.paths.get("adapter")
    if folder is not None:  # a Hub adapter's commit covers these
        names = [name for name in TAKEN_FROM_ADAPTER if (folder / name).is_file()]
        inputs["adapter_tokenizer"] = tree_sha256(folder, names)
    return inputs


def stale(resolved: Resolved, entry_id: str, artifact: Artifact) -> str | None:
    """The same contents in another folder have the same key, but are read from that folder."""
    source = artifact.json("source.json")
    path = resolved.paths.get(_input_name(entry_id))
    if source["kind"] != "folder" or path is None or source["folder"] == str(path.absolute()):
        return None
    return f"the checkpoint is now in {path}"


def run(context: StageContext) -> None:
    """Bring the checkpoint here, check it for this recipe, write `source.json`."""
    name = _input_name(context.entry.id)
    is_base = name == "base"
    source: dict[str, Any] = {}
    code = None if is_base else context.recipe.model.trust_remote_code
    commit: str | None = None
    if name in context.resolved.paths:
        folder = context.resolved.paths[name].absolute()
        source = {"kind": "folder", "folder": str(folder)}
    else:
        repo, _, commit = context.resolved.digests[name].rpartition("@")
        patterns: tuple[str, ...] = CHECKPOINT_FILES
        if code is not None:
            _require_read(repo, commit, code)
            code, patterns = LET_IN, (*CHECKPOINT_FILES, "*.py")
        folder = download(context, name, context.work / "model", patterns)
        source = {"kind": "hub", "folder": "model", "repo": repo, "commit": commit}
    raise_findings(
        examine(folder, commit=commit)[1]
        if is_base
        else check_checkpoint(folder, context.recipe, code, commit)
    )
    entries = hash_checkpoint(folder, context.runner.progress.step)
    _unchanged(context, name, folder, entries)
    if context.recipe.model.merges and not is_base:
        card = card_metadata(folder)
        source |= {"kind": "merged", "folder": "model", **_merge(context, folder)}
        folder = context.files / "model"
        raise_findings(check_checkpoint(folder, context.recipe))
        entries = hash_checkpoint(folder, context.runner.progress.step)
    else:
        card = card_metadata(folder)
        if source["kind"] == "hub":
            # linked, not moved: a kill before the commit must not cost the download
            shutil.copytree(folder, context.files / "model", copy_function=link_or_copy)
            folder = context.files / "model"
    source |= _facts(read_checkpoint(folder, code=LET_IN), card)
    source["files"] = [asdict(entry) for entry in entries]
    write_json(context.files / "source.json", source)


def _require_read(repo: str, commit: str, pin: str) -> None:
    """A SourceError where the recipe trusts the code of another commit than this."""
    if pin != commit:
        raise SourceError(
            f"model.trust_remote_code names {pin[:12]}..., and {repo} is fetched at {commit}",
            f"read its code at that commit, and set model.trust_remote_code: {commit}",
        )


def link_or_copy(source: str, target: str) -> None:
    """Another name for the same file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def hash_files(
    folder: Path, names: Sequence[str], report: Callable[[str, float, float, str], None]
) -> list[FileEntry]:
    """Size and sha256 of each file; `report` is told of GB hashed."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done, entries = sum(sizes.values()), 0, []
    for name, size in sizes.items():
        report("hashing the checkpoint", done / 1e9, total / 1e9, "GB")
        entries.append(FileEntry(name, size, file_sha256(folder / name)))
        done += size
    return entries


def hash_checkpoint(
    folder: Path, report: Callable[[str, float, float, str], None]
) -> list[FileEntry]:
    """:func:`hash_files` of a checkpoint whose weights are all finite; else a SourceError.

    The tensors are looked at as their bytes go by: a NaN would otherwise be found after hours, as
    garbage out of a server.
    """
    names = checkpoint_files(folder)
    total, done, entries = sum((folder / name).stat().st_size for name in names), 0, []
    faults: list[str] = []

    def tell(count: int) -> None:
        nonlocal done
        done += count
        report("reading the checkpoint", done / 1e9, total / 1e9, "GB")

    for name in names:
        path = folder / name
        if not name.endswith(".safetensors"):
            entries += hash_files(folder, [name], lambda *_: None)
            continue
        sha256, bad = hash_and_look(path, tell)
        entries.append(FileEntry(name, path.stat().st_size, sha256))
        faults += [f"{name}: {fault}" for fault in bad]
    if faults:
        more = f"; and {len(faults) - 3} more tensors" if faults[3:] else ""
        raise SourceError(
            f"the weights in {folder} are not all numbers: {'; '.join(faults[:3])}{more}",
            "take a checkpoint from before the training diverged, or download the file again",
        )
    return entries


def _facts(checkpoint: Checkpoint, card: dict[str, Any]) -> dict[str, Any]:
    positions = checkpoint.dimension("max_position_embeddings")
    return {
        "parameters": checkpoint.parameters,
        "weight_bytes": checkpoint.weight_bytes,
        "architecture": checkpoint.architecture,
        "tied_embeddings": checkpoint.tied_embeddings,
        "license": card.get("license"),
        "languages": _texts(card.get("language")),
        "base_model": next(iter(_texts(card.get("base_model"))), None),
        "licence_terms": {
            key: value for key in TERMS if isinstance(value := card.get(key), str) and value
        },
        "attention": attention(checkpoint.text_config),
        **({} if positions is None else {"positions": positions}),
        "chat_template": checkpoint.has_chat_template,
    }


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def downloads(resolved: Resolved) -> tuple[str, ...]:
    """Ids of the fetch stages whose checkpoint is on the Hub."""
    return tuple(one for one in ("fetch", BASE) if _input_name(one) not in resolved.paths)


def _input_name(entry_id: str) -> str:
    return "base" if entry_id == BASE else "model"


def _unchanged(
    context: StageContext, name: str, folder: Path, entries: Sequence[FileEntry]
) -> None:
    """A local folder must still be what the key was made of."""
    if name not in context.resolved.paths:
        return  # the download was checked against the Hub's own checksums
    if digest({entry.name: entry.sha256 for entry in entries}) != context.resolved.digests[name]:
        raise SourceError(
            f"the checkpoint in {folder} changed after the run began",
            "run the command again once nobody writes there",
        )


def download(context: StageContext, name: str, folder: Path, patterns: Sequence[str]) -> Path:
    """The pinned Hub snapshot of `name` (model or adapter) in `folder`, continued after a kill."""
    from quantize.hub import (
        repository as hub,  # imports an HTTP client: only runs that go online pay for it
    )

    repo, _, commit = context.resolved.digests[name].rpartition("@")
    access = hub.access_from_environment()
    listed = hub.list_files(access, repo, commit)
    top = {file: entry for file, entry in listed.items() if "/" not in file}
    if not any(file.endswith(".safetensors") for file in top):
        pickled = sorted(file for file in top if any_match(file, PICKLED))
        what = f"only pickled weights ({pickled[0]}, ...)" if pickled else "no safetensors"
        raise SourceError(
            f"{repo} at {commit[:12]} holds {what}",
            "use a revision or a conversion with safetensors",
        )
    needed = sum(entry.bytes for file, entry in top.items() if any_match(file, patterns))
    free = shutil.disk_usage(context.work).free + sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )
    if free < needed:
        raise ResourceError(
            f"{repo} takes {needed} bytes ({needed / 1e9:.1f} GB), the store has {free} free",
            "free some with `quantize store gc`, or name another place with --store",
        )
    hub.download_snapshot(
        access,
        repo,
        commit,
        folder,
        patterns=patterns,
        ignore=FOREIGN_WEIGHTS,
        on_progress=lambda done, total: context.runner.progress.step(
            f"downloading {repo}", done / 1e9, total / 1e9, "GB"
        ),
    )
    return folder


def _merge(context: StageContext, base: Path) -> dict[str, Any]:
    """Merge the adapter into `base`, in BF16, as `model/`; what `source.json` says of it."""
    folder, adapter = bring_adapter(context, read_checkpoint(base))
    output = context.files / "model"
    own_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = folder if own_tokenizer else base
    result = context.runner.worker(
        "llmcompressor",
        "merge",
        {
            "base": str(base),
            "adapter": str(folder.absolute()),
            "tokenizer": str(tokenizer.absolute()),
            "output": str(output),
        },
        work=context.work,
        label="merge",
        env={"HF_HUB_OFFLINE": "1"},
    )
    context.versions.update(result["versions"])
    copy_beside_weights(base, folder, tokenizer, output)
    adapter |= {"merged_modules": result["modules"], "untied": result["untied"]}
    return {"adapter": adapter, "merge_check": result["merge_check"]}


def bring_adapter(context: StageContext, base: Checkpoint) -> tuple[Path, dict[str, Any]]:
    """The adapter's folder, checked against its base, and where it came from."""
    model = context.recipe.model
    assert model.adapter is not None, "the planner asks for an adapter only where there is one"
    said: dict[str, Any] = {"source": model.adapter}
    folder = context.resolved.paths.get("adapter")
    if folder is None:
        folder = download(context, "adapter", context.work / "adapter", ADAPTER_FILES)
        said["commit"] = context.resolved.commit("adapter")
    raise_findings(check_adapter(folder, model.adapter_mode or "merge", base))
    adapter, _ = read_adapter(folder)
    note = notice(adapter, model.source) if adapter is not None else None
    if note is not None:
        context.notes.append(note)
        context.runner.progress.note(note)
    return folder, said


def copy_beside_weights(base: Path, adapter: Path, tokenizer: Path, output: Path) -> None:
    """Tokenizer, chat template, generation config, card and licence, as they are.

    The tokenizer is one folder's whole; the chat template is the adapter's where it has one, as
    that is what it was trained with; the generation config likewise. Card and licence are the
    base's.
    """
    (output / "generation_config.json").unlink(missing_ok=True)  # the library's rewriting of it
    for name in checkpoint_files(tokenizer):
        if name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, output / name)
    for name in checkpoint_files(base):
        if any_match(name, ("README.md", "LICENSE*", "preprocessor_config.json")):
            shutil.copyfile(base / name, output / name)
    for folder in (base, adapter):
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", output / "generation_config.json")
    template = chat_template(adapter) or chat_template(base)
    if template is not None and template != chat_template(output):
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")
