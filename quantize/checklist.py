"""The table of checks that precede every run, in the order in which they are reported.

`quantize check` shows each with what it found; a run raises all findings as one error
(:func:`preflight`). A check is a function of the situation that tells findings (a run does not
begin), notes, or why it could not be made. Nothing here loads weights, and nothing is written but a
folder that is removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from quantize import preflight as parts
from quantize.adapter_checks import check_adapter
from quantize.calibration_checks import check_calibration, has_messages
from quantize.checkpoint import Checkpoint, examine
from quantize.engine_checks import check_engine
from quantize.engines import stream
from quantize.environment_checks import check_environments
from quantize.environments import Environments
from quantize.errors import QuantizeError
from quantize.findings import Finding, Told, raise_findings
from quantize.header_checks import check_headers, notes_on_dtypes, promises_of
from quantize.parallel_checks import cpu_kernel_findings
from quantize.resource_checks import check_resources
from quantize.schemes import IMATRIX
from quantize.server_checks import check_serving
from quantize.source_checks import (
    check_lengths,
    check_parallel,
    check_schemes,
    chosen_weights,
)
from quantize.stages.base import Resolved
from quantize.stages.fetch import downloads
from quantize.stages.measure import unpacks_because
from quantize.template_checks import check_chat_template
from quantize.tokenizer_checks import check_tokenizer

ALL = parts.ALL


@dataclass
class Situation:
    """What a check may look at."""

    resolved: Resolved
    store: Path  # need not exist yet
    to_run: Collection[str] = ALL  # kinds, and ids where known, of the stages that are not done
    online: bool = True
    environments: Environments | None = None
    wanted: tuple[str, ...] = ()  # names of the environments that the run enters
    outline: Path | None = None  # a Hub checkpoint without its weights
    checkpoint: Checkpoint | None = None

    def unread(self, name: str) -> str:
        """Why an input that is not here cannot be looked at."""
        if name in self.resolved.digests:
            return "it cannot be read before it is fetched"
        return "it is neither here nor at a known commit of the Hub: see inputs"

    @property
    def folder(self) -> Path | None:
        """Where the checkpoint is, as far as it can be read."""
        return self.resolved.paths.get("model", self.outline)


@dataclass(frozen=True)
class Check:
    """A name for people, and what is done."""

    name: str
    make: Callable[[Situation], Told]


@dataclass(frozen=True)
class Checked:
    """One check and what it told."""

    name: str
    told: Told

    @property
    def outcome(self) -> str:
        """`failed`, `unchecked` (it could not be made), `skipped` (nothing to check), `passed`."""
        if self.told.findings:
            return "failed"
        if self.told.unchecked:
            return "unchecked"
        return "skipped" if self.told.skipped else "passed"


HUB_INPUTS = (
    ("model", "model", {"fetch"}),
    ("adapter", "model", {"fetch", "adapter"}),
    ("base", "model", {"fetch"}),
    ("artifact", "model", {"adopt"}),
    ("calibration", "dataset", {"calibrate"}),
    ("text", "dataset", {"measure"}),
    ("own_text", "dataset", {"measure"}),
)
"""Inputs that may be on the Hub, the kind of repository, and the stages that read them."""


def on_source(now: Situation) -> Told:
    """Hub only: the revision is there, this token may read the files, the terms are accepted."""
    asked = {
        name: kind
        for name, kind, stages in HUB_INPUTS
        if name in now.resolved.digests
        and name not in now.resolved.paths
        and stages & set(now.to_run)
    }
    if not asked:
        return Told(skipped="nothing has to come from the Hub")
    if not now.online:
        return Told(unchecked="offline")
    from quantize.hub.sources import check_sources

    return check_sources(now.resolved, asked, now.store, now.to_run, now.outline)


def on_files(now: Situation) -> Told:
    """config.json, safetensors headers, index, tokenizer files; no code, nothing quantized."""
    if now.folder is None or ("model" not in now.resolved.paths and not any(now.folder.iterdir())):
        return Told(unchecked=now.unread("model"))
    pin = now.resolved.recipe.model.trust_remote_code
    now.checkpoint, findings = examine(now.folder, code=pin, commit=now.resolved.commit("model"))
    if "base" in now.resolved.paths:
        findings += examine(now.resolved.paths["base"])[1]
    if now.checkpoint is None or findings:
        return Told(findings)
    return Told(notes=notes_on_dtypes(now.checkpoint))


def _with_checkpoint(check: Callable[[Situation, Checkpoint], Told]) -> Callable[[Situation], Told]:
    """A check that needs a checkpoint whose files are sound."""

    def make(now: Situation) -> Told:
        if now.checkpoint is None:
            return Told(unchecked="there is no sound checkpoint to read yet")
        return check(now, now.checkpoint)

    return make


def on_headers(now: Situation, checkpoint: Checkpoint) -> Told:
    """Every tensor that config.json promises, in its shape, and no other."""
    promises = promises_of(checkpoint)
    if promises is None:
        return Told(
            unchecked=f"names and shapes of {checkpoint.architecture} are not in the table; the "
            "weights' loader refuses what is missing"
        )
    return Told(check_headers(checkpoint, promises))


def on_tokenizer(now: Situation, checkpoint: Checkpoint) -> Told:
    """Token ids within the embedding, special tokens that exist."""
    if _other_tokenizer(now):
        return Told(skipped="the adapter brings a tokenizer of its own")
    return check_tokenizer(checkpoint)


def on_template(now: Situation, checkpoint: Checkpoint) -> Told:
    """The chat template renders a plain message; a note where nothing here renders one."""
    if not checkpoint.has_chat_template:
        return Told(skipped="the checkpoint has no chat template")
    if _other_tokenizer(now):
        return Told(skipped="the adapter brings a tokenizer of its own")
    findings = check_chat_template(checkpoint)
    calibration = now.resolved.paths.get("calibration")
    needed = now.resolved.suite is not None or (
        calibration is not None and has_messages(calibration)
    )
    if needed:
        return Told(findings)
    return Told(notes=[finding.message for finding in findings])


def on_schemes(now: Situation, checkpoint: Checkpoint) -> Told:
    """Module patterns, group sizes, blocks, tied heads, what is served as one matrix."""
    recipe = now.resolved.recipe
    told = Told(check_schemes(checkpoint, recipe))
    reason = stream.leaves(checkpoint.architecture, recipe)
    if recipe.quantize.engine == "stream" and reason is not None:
        told.notes.append(f"llm-compressor's oneshot quantizes: {reason}")
    scheme = recipe.quantize.effective_scheme
    if scheme in IMATRIX and recipe.calibration is None and recipe.quantize.artifact is None:
        told.notes.append(
            f"no calibration data: {scheme} is rounded without an importance matrix, and loses "
            "more, much more where a few channels are large (docs/gguf.md)"
        )
    return told


def on_engine(now: Situation, checkpoint: Checkpoint) -> Told:
    """Whether the engine that the recipe names takes this config and these shapes."""
    return Told(check_engine(checkpoint, now.resolved.recipe))


def on_parallel(now: Situation, checkpoint: Checkpoint) -> Told:
    """Heads, inputs, outputs and packed tensors over every size; the CPU kernel's tiles."""
    resolved = now.resolved
    told = Told(check_parallel(checkpoint, resolved.recipe))
    kernel = resolved.recipe.serve.engine == "vllm" and resolved.accelerator == "cpu"
    if resolved.suite is not None and kernel:
        chosen = chosen_weights(checkpoint, resolved.recipe.quantize)
        size = resolved.recipe.serve.tensor_parallel_size
        told.findings += cpu_kernel_findings(checkpoint, chosen, size)
    return told


def on_lengths(now: Situation, checkpoint: Checkpoint) -> Told:
    """Context and calibration lengths against the trained positions; the suite's windows."""
    told = Told(check_lengths(checkpoint, now.resolved.recipe))
    if "measure" in now.to_run:
        told.findings += parts.check_suite(checkpoint, now.resolved)
    return told


def on_adapter(now: Situation) -> Told:
    """A LoRA adapter against its base."""
    model = now.resolved.recipe.model
    if model.adapter is None:
        return Told(skipped="the recipe has no adapter")
    if "adapter" not in now.resolved.paths:
        return Told(unchecked=now.unread("adapter"))
    path = now.resolved.paths["adapter"]
    return Told(check_adapter(path, model.adapter_mode or "merge", now.checkpoint))


def on_calibration(now: Situation) -> Told:
    """A local calibration file, row by row."""
    path = now.resolved.paths.get("calibration")
    if path is None:
        if now.resolved.recipe.calibrates:
            return Told(unchecked=now.unread("calibration"))
        return Told(skipped="the method needs no data")
    if "calibrate" not in now.to_run:
        return Told(skipped="it is calibrated already")
    template = now.checkpoint.has_chat_template if now.checkpoint is not None else None
    if "adapter" in now.resolved.paths or now.resolved.recipe.model.adapter is not None:
        template = None if template is False else template  # the adapter may bring one
    return Told(check_calibration(path, has_chat_template=template))


def on_texts(now: Situation) -> Told:
    """The held-out texts that perplexity is taken on."""
    if "measure" not in now.to_run or not {"text", "own_text"} & set(now.resolved.paths):
        return Told(skipped="no local text is measured")
    return Told(parts.check_texts(now.resolved))


def on_card(now: Situation) -> Told:
    """The recipe's own card template."""
    path = now.resolved.paths.get("card_template")
    if path is None or "card" not in now.to_run:
        return Told(skipped="the shipped template is used")
    return Told(parts.check_card_template(path))


def on_resources(now: Situation, checkpoint: Checkpoint) -> Told:
    """Disk and memory."""
    resolved = now.resolved
    findings = check_resources(
        checkpoint,
        resolved.recipe,
        now.store,
        now.to_run,
        resolved.accelerator,
        downloads=downloads(resolved),
        unpacks=unpacks_because(resolved) is not None,
    )
    return Told(findings)


def on_environments(now: Situation) -> Told:
    """The tools' environments: there, whole, and what an installation will need."""
    if now.environments is None or not now.wanted:
        return Told(skipped="no environment is entered")
    return check_environments(now.environments, now.wanted)


def on_server(now: Situation) -> Told:
    """A port on the loopback interface, the server's program, or endpoints that are up."""
    if now.resolved.suite is None or "measure" not in now.to_run:
        return Told(skipped="nothing is served")
    return check_serving(
        now.resolved.recipe.serve,
        now.resolved.accelerator,
        now.checkpoint.architecture if now.checkpoint is not None else None,
        now.environments,
        online=now.online,
    )


def on_folder_target(now: Situation) -> Told:
    """It keeps clear of the store and of what the recipe reads."""
    if now.resolved.recipe.publish.folder is None or "publish" not in now.to_run:
        return Told(skipped="nothing is published to a folder")
    return Told(parts.check_folder(now.resolved, now.store))


def on_hub_target(now: Situation) -> Told:
    """Token, permission, visibility, files of others, tag and collection."""
    hub = now.resolved.recipe.publish.hub
    if hub is None or "publish" not in now.to_run:
        return Told(skipped="nothing is published to the Hub")
    findings = parts.check_hub_target(now.resolved, hub, online=now.online)
    if not findings and not now.online:
        return Told(unchecked="offline: a token is there, and the Hub was not asked")
    return Told(findings)


def on_url_target(now: Situation) -> Told:
    """Credentials, bucket, and whose files it holds."""
    url = now.resolved.recipe.publish.url
    if url is None or "publish" not in now.to_run:
        return Told(skipped="nothing is published to a URL")
    if not now.online:
        return Told(unchecked="offline")
    from quantize.bucket.target import check_url

    check_url(url)
    return Told()


def on_signature(now: Situation) -> Told:
    """The key or identity that signs."""
    sign = now.resolved.recipe.publish.sign
    if sign is None or "publish" not in now.to_run:
        return Told(skipped="nothing is signed")
    from quantize import signing

    return Told(signing.findings(sign, online=now.online))


CHECKS: tuple[Check, ...] = (
    Check("Hub sources", on_source),
    Check("checkpoint files", on_files),
    Check("tensor names and shapes", _with_checkpoint(on_headers)),
    Check("tokenizer", _with_checkpoint(on_tokenizer)),
    Check("chat template", _with_checkpoint(on_template)),
    Check("schemes and groups", _with_checkpoint(on_schemes)),
    Check("engine", _with_checkpoint(on_engine)),
    Check("tensor parallelism", _with_checkpoint(on_parallel)),
    Check("lengths", _with_checkpoint(on_lengths)),
    Check("adapter", on_adapter),
    Check("calibration data", on_calibration),
    Check("held-out texts", on_texts),
    Check("card template", on_card),
    Check("disk and memory", _with_checkpoint(on_resources)),
    Check("environments", on_environments),
    Check("server", on_server),
    Check("folder target", on_folder_target),
    Check("Hub target", on_hub_target),
    Check("URL target", on_url_target),
    Check("signature", on_signature),
)


def survey(now: Situation) -> list[Checked]:
    """Every check of the table, in order."""
    with _outline(now):
        return [Checked(check.name, _told(check, now)) for check in CHECKS]


def preflight(
    resolved: Resolved,
    store: Path,
    to_run: Collection[str] = ALL,
    *,
    online: bool = True,
    environments: Environments | None = None,
    wanted: Sequence[str] = (),
) -> list[Checked]:
    """Raise one error with every finding; without any, all that the checks told.

    `to_run` names the kinds of stages that are not done. SourceError before ResourceError before
    CredentialsError before ConflictError; see :func:`quantize.findings.raise_findings`. The Hub
    and URLs are asked only when `online`.
    """
    now = Situation(resolved, store, to_run, online, environments, tuple(wanted))
    checked = survey(now)
    raise_findings([finding for one in checked for finding in one.told.findings])
    return checked


def _told(check: Check, now: Situation) -> Told:
    """What a check tells; an error of ours that it meets is a finding."""
    try:
        told = check.make(now)
    except QuantizeError as error:
        told = Told([Finding.of(error)])
    if now.outline is None:
        return told
    # The outline is gone when the message is read: its files are the repository's.
    place, name = str(now.outline), now.resolved.recipe.model.source

    def named(text: str) -> str:
        return text.replace(place, name)

    return replace(
        told,
        findings=[
            replace(one, message=named(one.message), hint=named(one.hint)) for one in told.findings
        ],
        notes=[named(note) for note in told.notes],
        unchecked=named(told.unchecked),
    )


@contextmanager
def _outline(now: Situation) -> Iterator[None]:
    """A folder for a Hub checkpoint without its weights, where one is about to be fetched."""
    resolved = now.resolved
    fetches = "model" in resolved.digests and "model" not in resolved.paths
    if not (fetches and now.online and "fetch" in now.to_run):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="quantize-outline-") as folder:
        now.outline = Path(folder)
        try:
            yield
        finally:
            now.outline = None


def _other_tokenizer(now: Situation) -> bool:
    """Whether a merged or served model takes the adapter's tokenizer instead of the base's."""
    path = now.resolved.paths.get("adapter")
    names = ("tokenizer.json", "tokenizer.model")
    return path is not None and any((path / name).is_file() for name in names)
