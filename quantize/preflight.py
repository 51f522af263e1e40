"""Checks before a run that concern the recipe's other inputs, the machine and the targets.

:mod:`quantize.checklist` has the table in which they stand, and calls them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from quantize.checkpoint import LAYER, Checkpoint
from quantize.engine.support import why_not
from quantize.errors import CredentialsError, QuantizeError, ResourceError, TransientError
from quantize.findings import Finding
from quantize.machine import memory_bytes
from quantize.recipe import Recipe
from quantize.source_checks import promised_bytes
from quantize.stages.base import Resolved
from quantize.targets import Hub

ALL = frozenset({"fetch", "adapter", "calibrate", "compress", "measure", "card", "publish"})

SLACK_BYTES = 256 << 20
"""Logs, samples and token ids of one run."""

HEAD_BYTES = 1 << 20
"""How much of a calibration file tells whether it holds conversations."""

SCAN_LIMIT_BYTES = 64 << 20
"""How much of a calibration file is parsed beforehand; the calibrate stage reads the rest."""


def check_calibration(path: Path, *, has_chat_template: bool | None) -> list[Finding]:
    """What keeps a local calibration file from being used, with line numbers.

    `has_chat_template` is None where it is not known yet.
    """
    if not path.is_file():
        return [Finding(f"the calibration file {path} does not exist", "correct its path")]
    if path.suffix == ".parquet":
        return _check_parquet(path)
    if path.suffix == ".txt":
        return _check_text(path)
    return _check_json_lines(path, has_chat_template)


def check_card_template(path: Path) -> list[Finding]:
    """Mistakes of a recipe's own card template that show without a record."""
    from quantize.report.card_template import check_template  # jinja2

    return check_template(path)


def check_suite(checkpoint: Checkpoint, resolved: Resolved) -> list[Finding]:
    """What the suite asks of the server at once must fit its context."""
    suite = resolved.suite
    limit = resolved.recipe.serve.max_model_len
    limit = limit or checkpoint.dimension("max_position_embeddings")
    if suite is None or limit is None:
        return []
    asked = {
        "load: input_tokens + output_tokens": suite.load.input_tokens + suite.load.output_tokens
    }
    if suite.perplexity is not None:  # the server insists on making one token
        asked["perplexity: window + 1"] = suite.perplexity.window + 1
    return [
        Finding(
            f"suite {suite.name}: {what} is {tokens}, the served context {limit}",
            "shorten it in the suite, or raise serve.max_model_len where the checkpoint allows it",
        )
        for what, tokens in asked.items()
        if tokens > limit
    ]


def check_resources(
    checkpoint: Checkpoint, recipe: Recipe, store: Path, to_run: Collection[str]
) -> list[Finding]:
    """Disk for what the run writes, and memory for what it loads.

    Disk: the artifact's tensors as the scheme promises, a merged checkpoint in BF16 where there is
    an adapter, and SLACK_BYTES. Memory: what must be held at once (:func:`_held_at_once`);
    without so much the machine cannot even begin.
    """
    findings = []
    in_bf16 = 2 * checkpoint.parameters
    needed = SLACK_BYTES
    if "compress" in to_run:
        needed += promised_bytes(checkpoint, recipe)
    if "fetch" in to_run and recipe.model.merges:
        needed += in_bf16
    place = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        findings.append(
            Finding(
                f"the store {store} has {free} bytes free ({_gb(free)}), "
                f"this run writes about {needed} ({_gb(needed)})",
                "free some with `quantize store gc`, or name another place with --store",
                ResourceError,
            )
        )
    memory = memory_bytes()
    held, what = _held_at_once(checkpoint, recipe, to_run)
    if memory < held:
        findings.append(
            Finding(
                f"this machine has {_gb(memory)} of memory, {what} alone takes {_gb(held)}",
                "run on a machine with more memory",
                ResourceError,
            )
        )
    return findings


def _held_at_once(
    checkpoint: Checkpoint, recipe: Recipe, to_run: Collection[str]
) -> tuple[int, str]:
    """Bytes of weights that are in memory together, and what they are, in words.

    llm-compressor holds the whole checkpoint in BF16. Merging an adapter holds it as it is stored,
    and one layer in FP32 beside it. The streaming engine holds a layer and reads the next, or what
    lies outside the layers.
    """
    quantize = recipe.quantize
    layer, outside = _largest_parts(checkpoint)
    if recipe.model.merges and "fetch" in to_run:
        stored = max(checkpoint.weight_bytes, 2 * checkpoint.parameters)
        return stored + 2 * layer, "the checkpoint with one layer in FP32"
    streams = quantize.engine == "stream"
    if not streams or why_not(checkpoint.architecture, quantize.ignore) is not None:
        return 2 * checkpoint.parameters, "the checkpoint"
    pair = 2 * layer
    if pair > outside:
        return pair, "a pair of layers"
    return outside, "its embedding"


def _largest_parts(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes in BF16 of the largest layer, and of everything outside the layers."""
    parts: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        layer = LAYER.search(name)
        parts[name[: layer.end()] if layer else ""] += 2 * info.elements
    outside = parts.pop("", 0)
    return max(parts.values(), default=0), outside


def check_hub_target(resolved: Resolved, hub: Hub, *, online: bool) -> list[Finding]:
    """Whether there is a token for the Hub, and whether the Hub says that the target fits."""
    from quantize.hub.client import access_from_environment  # only recipes that publish pay for it

    access = access_from_environment()
    if access.token is None:
        message = f"publish.hub names {hub.repo}, but there is no token"
        hint = "set HF_TOKEN, or run `hf auth login`, with a token that may write"
        return [Finding(message, hint, CredentialsError)]
    if not online:
        return []
    from quantize.hub.preflight import check_hub
    from quantize.publication import recipe_as_published

    return check_hub(access, resolved, hub, lambda: recipe_as_published(resolved))


def check_place(url: str) -> list[Finding]:
    """Whether a URL can be published to: backend, credentials, bucket, and whose files it holds."""
    from quantize.bucket.target import check_url

    try:
        check_url(url)
    except TransientError:
        raise
    except QuantizeError as error:
        return [Finding.of(error)]
    return []


def _check_json_lines(path: Path, has_chat_template: bool | None) -> list[Finding]:
    """One JSON object a line, with `messages` or `text`; blank lines do not count."""
    where: dict[str, int] = {}  # first line of each kind
    kinds: Counter[str] = Counter()
    with path.open("rb") as file:
        read = 0
        for number, line in enumerate(file, 1):
            read += len(line)
            if read > SCAN_LIMIT_BYTES:
                break
            if not line.strip():
                continue
            try:
                kind = _kind(json.loads(line.decode("utf-8")))
            except UnicodeDecodeError:
                return [Finding(f"{path}:{number}: not UTF-8", "convert the file to UTF-8")]
            except (ValueError, RecursionError) as error:
                hint = "each line is one object with `messages` or `text`"
                return [Finding(f"{path}:{number}: not JSON: {error}", hint)]
            kinds[kind] += 1
            where.setdefault(kind, number)
    if not kinds:
        return [_empty(path)]
    findings = []
    if not kinds["messages"] and not kinds["text"]:
        findings.append(
            Finding(
                f"{path}:{where['neither']}: neither `messages` nor `text`, like every other row",
                "rename the column, or write the file anew: one object a line",
            )
        )
    if kinds["messages"] and has_chat_template is False:
        findings.append(
            Finding(
                f"{path}:{where['messages']}: {kinds['messages']} rows have `messages`, but the "
                "checkpoint has no chat template",
                "add chat_template.jinja to the checkpoint, or give rows with `text`",
            )
        )
    return findings


def has_messages(path: Path) -> bool:
    """Whether one of the first rows of a JSON lines file is a conversation."""
    if path.suffix in (".parquet", ".txt"):
        return False
    with path.open("rb") as file:
        for line in file.readlines(HEAD_BYTES):
            with suppress(ValueError, RecursionError):
                if _kind(json.loads(line.decode("utf-8"))) == "messages":
                    return True
    return False


def _kind(row: object) -> str:
    if isinstance(row, dict):
        messages, text = row.get("messages"), row.get("text")
        if isinstance(messages, list) and messages:
            return "messages"
        if isinstance(text, str) and text.strip():
            return "text"
    return "neither"


def _check_text(path: Path) -> list[Finding]:
    line = 1
    blank = True
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                blank = not raw.decode("utf-8").strip() and blank
            except UnicodeDecodeError:
                return [Finding(f"{path}:{line}: not UTF-8", "convert the file to UTF-8")]
    return [_empty(path)] if blank else []


def _check_parquet(path: Path) -> list[Finding]:
    """The magic bytes at both ends; columns are the calibrate stage's to read."""
    size = path.stat().st_size
    if size == 0:
        return [_empty(path)]
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, size - 4))
        tail = file.read(4)
    if size >= 12 and head == tail == b"PAR1":
        return []
    return [Finding(f"{path} is not a complete parquet file", "download or write it again")]


def _empty(path: Path) -> Finding:
    return Finding(
        f"the calibration file {path} is empty", "give it rows: one JSON object with `text` a line"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
