"""Every cheap check before a run, reported together: seconds now instead of hours later.

Nothing here loads weights. A Hub checkpoint is checked in the same way once it is fetched
(:func:`quantize.source_checks.check_checkpoint`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from quantize.adapter_checks import check_adapter
from quantize.checkpoint import Checkpoint, examine
from quantize.errors import CredentialsError, QuantizeError, TransientError
from quantize.findings import Finding, raise_findings
from quantize.resource_checks import check_resources
from quantize.source_checks import check_source
from quantize.stages.base import Resolved
from quantize.targets import Hub

ALL = frozenset({"fetch", "calibrate", "compress", "measure", "card", "publish"})

SCAN_LIMIT_BYTES = 64 << 20
"""How much of a calibration file is parsed beforehand; the calibrate stage reads the rest."""


def preflight(
    resolved: Resolved, store: Path, to_run: Collection[str] = ALL, *, online: bool = True
) -> None:
    """Raise one error with every finding; `to_run` names the kinds of stages that are not done.

    SourceError before ResourceError before CredentialsError before ConflictError; see
    :func:`quantize.findings.raise_findings`. `store` need not exist yet. The Hub is asked about
    token and target, and a URL what it holds, only when `online` and publishing there.
    """
    recipe, paths = resolved.recipe, resolved.paths
    findings: list[Finding] = []
    checkpoint: Checkpoint | None = None
    template: bool | None = None  # unknown before a Hub checkpoint is fetched
    if "model" in paths:
        checkpoint, findings = examine(paths["model"])
    if checkpoint is not None:
        findings += check_source(checkpoint, recipe)
        template = checkpoint.has_chat_template
        if "measure" in to_run:
            findings += check_suite(checkpoint, resolved)
    if "adapter" in paths:
        mode = recipe.model.adapter_mode or "merge"
        findings += check_adapter(paths["adapter"], mode, checkpoint)
        template = None if template is False else template  # the adapter may bring one
    if "calibration" in paths and "calibrate" in to_run:
        findings += check_calibration(paths["calibration"], has_chat_template=template)
    if "card_template" in paths and "card" in to_run:
        findings += check_card_template(paths["card_template"])
    if checkpoint is not None:
        findings += check_resources(checkpoint, recipe, store, to_run, resolved.accelerator)
    if recipe.publish.hub is not None and "publish" in to_run:
        findings += check_hub_target(resolved, recipe.publish.hub, online=online)
    if recipe.publish.url is not None and "publish" in to_run and online:
        findings += check_place(recipe.publish.url)
    if recipe.publish.sign is not None and "publish" in to_run:
        from quantize import signing

        findings += signing.findings(recipe.publish.sign, online=online)
    raise_findings(findings)


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
