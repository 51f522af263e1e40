"""Checks before a run that concern the recipe's other inputs, the machine and the targets.

:mod:`quantize.checklist` has the table in which they stand, and calls them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from quantize.checkpoint import LAYER, Checkpoint
from quantize.engine.support import why_not
from quantize.errors import (
    CredentialsError,
    QuantizeError,
    ResourceError,
    SourceError,
    TransientError,
)
from quantize.findings import Finding
from quantize.machine import memory_bytes
from quantize.recipe import Recipe
from quantize.source_checks import promised_bytes
from quantize.stages.base import Resolved
from quantize.targets import Hub

ALL = frozenset({"fetch", "adapter", "calibrate", "compress", "measure", "card", "publish"})

SLACK_BYTES = 256 << 20
"""Logs, samples and token ids of one run."""


def check_texts(resolved: Resolved) -> list[Finding]:
    """Held-out texts that the measurement could not read, hours later."""
    from quantize.measure.perplexity import read_documents

    suite, evaluate = resolved.suite, resolved.recipe.evaluate
    fields = {
        "text": suite.perplexity.field if suite is not None and suite.perplexity else None,
        "own_text": evaluate.text.field if evaluate is not None and evaluate.text else None,
    }
    findings = []
    for name, field in fields.items():
        if field is None or name not in resolved.paths:
            continue
        try:
            if not any(text.strip() for text in read_documents(resolved.paths[name], field)):
                message = f"the held-out text {resolved.paths[name]} is empty"
                findings.append(Finding(message, "give it text"))
        except SourceError as error:
            findings.append(Finding.of(error))
    return findings


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


def check_folder(resolved: Resolved, store: Path) -> list[Finding]:
    """Whether `publish.folder` keeps clear of the store and of what the recipe reads."""
    from quantize.folder_target import folder_findings
    from quantize.publication import target_folder

    read = [path for name, path in resolved.paths.items() if name in ("model", "adapter", "base")]
    return folder_findings(target_folder(resolved.recipe), [*read, store])


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


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
