"""Checks before a run that concern the recipe's other inputs, the machine and the targets.

:mod:`quantize.checklist` has the table in which they stand, and calls them.
"""

from __future__ import annotations

from pathlib import Path

from quantize.checkpoint import Checkpoint
from quantize.errors import CredentialsError, SourceError
from quantize.findings import Finding
from quantize.stages.base import Resolved
from quantize.targets import Hub

ALL = frozenset(
    {"fetch", "adapter", "gguf", "calibrate", "compress", "adopt", "convert"}
    | {"measure", "card", "publish"}
)


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
