"""fetch-adapter: a LoRA adapter that stays apart from the checkpoint it belongs to.

Input: `fetch`, its base. Copies the adapter into `adapter/`. Where it brings a tokenizer or a chat
template, `adapter/` gets the whole tokenizer that the pair is asked with: the adapter's, or else
the base's, and the chat template of the adapter, or else of the base. Writes `adapter.json`::

    {"source": as the recipe names it, "commit"?: Hub only,
     "rank": the largest of any module, "modules": how many it adapts,
     "targets": the last parts of their names,
     "trained_on"?: what its config calls its base,
     "tokenizer": whether `adapter/` holds one,
     "files": [{"name", "bytes", "sha256"}]}   # in `adapter/`
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from quantize.checkpoint import chat_template, model_folder, read_checkpoint
from quantize.errors import SourceError
from quantize.keys import tree_sha256
from quantize.model_files import TOKENIZER_FILES
from quantize.protocol import write_json
from quantize.report.redact import base_name
from quantize.report.results import HUB_ID
from quantize.stages import fetch
from quantize.stages.base import Resolved, StageContext

VERSION = 1

FETCH_ADAPTER = "fetch-adapter"
"""Id of the stage."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: files are copied."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The adapter's contents, with the tokenizer that it brings."""
    return fetch.adapter_inputs(resolved)


def run(context: StageContext) -> None:
    """Check the adapter against its base, copy it, write `adapter.json`."""
    base = model_folder(context.inputs["fetch"])
    folder, said = fetch.bring_adapter(context, read_checkpoint(base))
    adapter, _ = read_adapter(folder)
    assert adapter is not None, "bring_adapter has checked it"
    output = context.files / "adapter"
    output.mkdir()
    copy_adapter(folder, base, output)
    _unchanged(context, output)
    names = sorted(path.name for path in output.iterdir())
    entries = fetch.hash_files(output, names, context.runner.progress.step)
    write_json(
        context.files / "adapter.json",
        said | _facts(adapter, output) | {"files": [asdict(entry) for entry in entries]},
    )


def copy_adapter(folder: Path, base: Path, output: Path) -> None:
    """Config and weights as they are; the pair's tokenizer where the adapter changes it."""
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, output / name)
    brings = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not brings:
        return
    own = bool({"tokenizer.json", "tokenizer.model"} & brings)
    for name in TOKENIZER_FILES:
        source = (folder if own else base) / name
        if source.is_file():
            shutil.copyfile(source, output / name)
    template = chat_template(folder) or chat_template(base)
    if template is not None and template != chat_template(output):
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def _unchanged(context: StageContext, output: Path) -> None:
    """A local adapter must still be what the key was made of; a download was checked already."""
    if "adapter" not in context.resolved.paths:
        return
    if tree_sha256(output, [CONFIG, WEIGHTS]) != context.resolved.digests["adapter"]:
        raise SourceError(
            f"the adapter in {context.resolved.paths['adapter']} changed after the run began",
            "run the command again once nobody writes there",
        )


def _facts(adapter: Adapter, output: Path) -> dict[str, Any]:
    named = adapter.trained_on
    facts: dict[str, Any] = {
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "targets": adapter.targets,
        "tokenizer": any((output / n).is_file() for n in ("tokenizer.json", "tokenizer.model")),
    }
    if named is not None:  # a local path says nothing to others
        on_hub = HUB_ID.fullmatch(named) and not named.startswith((".", "~"))
        facts["trained_on"] = named if on_hub else base_name(named)
    return facts
