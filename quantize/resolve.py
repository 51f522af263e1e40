"""What a recipe's result depends on outside the recipe itself, read once, up front.

Files are identified by the sha256 of their contents, Hub repositories by their commit. A commit
that is not pinned is looked up only when `online`; otherwise the name stays absent, and the plan
calls the stages that need it pending.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantize.calibration_checks import check_calibration
from quantize.errors import QuantizeError, SourceError, TransientError, UsageError
from quantize.evaluation import Evaluate
from quantize.findings import Faults
from quantize.hash_cache import HashCache
from quantize.keys import digest
from quantize.model_files import checkpoint_files, read_weights, unsound_files
from quantize.recipe import Model, Recipe
from quantize.recipe_file import load_prompts, load_suite
from quantize.resources import find_checkpoint, find_data, find_path, find_prompts, find_suite
from quantize.stages.base import Resolved
from quantize.suite import Prompts, Suite
from quantize.targets import Sign
from quantize.tensors import read_header
from quantize.untrusted import (
    HELD_OUT_LIMIT_BYTES,
    TABLE_LIMIT_BYTES,
    TEXT_LIMIT_BYTES,
    read_bytes,
)

PLAN_HASH_LIMIT_BYTES = 2 << 30
"""What a plan hashes at most of a local checkpoint that it has not seen before."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}")
TASK_NAME = re.compile(r"""(?m)^(?:task|group)\s*:\s*["']?([\w.+-]+)""")


def resolve(
    recipe: Recipe,
    recipe_path: Path,
    accelerator: str,
    *,
    online: bool,
    cache_path: Path,
    hash_limit_bytes: int | None = None,
    on_hashed: Callable[[int, int], None] | None = None,
    faults: Faults | None = None,
) -> Resolved:
    """Digests and local paths of everything that `recipe` names.

    `digests` holds `model`, and where the recipe has such a part `adapter`, `base` (if it is
    measured), `artifact`, `calibration`, `suite`, `text`, `own_text`, `prompts`, `tasks`, `health`,
    `card_template` and `sign`. A checkpoint folder with more than `hash_limit_bytes` that
    `cache_path` does not know is left absent. `on_hashed` is told (bytes done, bytes in all).

    Raises SourceError for a local input that is missing or unreadable, RecipeError for a mistake in
    the suite or its prompts, and what :mod:`quantize.hub` raises when `online`; all of them at
    once. With `faults` they are kept there instead, and what they concern stays absent.
    """
    own = Faults() if faults is None else faults
    folder = recipe_path.absolute().parent
    cache = HashCache(cache_path, on_hashed=on_hashed)
    inputs = _Inputs(cache, online, hash_limit_bytes, own)
    _resolve_model(recipe, folder, inputs)
    if recipe.calibration is not None and recipe.calibrates:
        calibration = recipe.calibration
        with own.kept():
            path = find_data(calibration.source, folder, "calibration.source")
            inputs.data("calibration", path, calibration.source, calibration.revision)
    if recipe.quantize.artifact is not None:
        artifact, revision = recipe.quantize.artifact, recipe.quantize.artifact_revision
        with own.kept():
            path = find_checkpoint(artifact, folder, "quantize.artifact")
            if path is None:
                inputs.hub("artifact", artifact, revision, "model")
            else:
                inputs.checkpoint("artifact", path, checkpoint_files(path))
    suite = _resolve_evaluation(recipe, folder, inputs)
    if recipe.publish.sign is not None:
        _resolve_signer(recipe.publish.sign, inputs)
    if recipe.publish.card_template is not None:
        with own.kept():
            _resolve_template(recipe.publish.card_template, folder, inputs)
    cache.save()
    if faults is None:
        own.raise_all()
    return Resolved(recipe, folder, accelerator, inputs.digests, inputs.paths, suite)


def _resolve_evaluation(recipe: Recipe, folder: Path, inputs: _Inputs) -> Suite | None:
    """The suite with what it names, a text of the recipe's own, and the base that is measured."""
    evaluate = recipe.evaluate
    if evaluate is None:
        return None
    suite = None
    with inputs.faults.kept():
        suite = _resolve_suite(evaluate, folder, inputs)
        _check_task_names(evaluate, suite)
    with inputs.faults.kept():
        if evaluate.text is not None:
            path = find_data(evaluate.text.text, folder, "evaluate.text")
            inputs.data("own_text", path, evaluate.text.text, evaluate.text.revision)
    with inputs.faults.kept():
        if measures_base(recipe, suite):
            _resolve_base(recipe.model, folder, inputs)
    return suite


def _resolve_model(recipe: Recipe, folder: Path, inputs: _Inputs) -> None:
    model = recipe.model
    with inputs.faults.kept():
        path = find_checkpoint(model.source, folder)
        if path is None:
            inputs.hub("model", model.source, model.revision, "model")
        else:
            inputs.checkpoint("model", path, checkpoint_files(path))
    if model.adapter is None:
        return
    with inputs.faults.kept():
        path = find_checkpoint(model.adapter, folder, "model.adapter")
        if path is None:
            inputs.hub("adapter", model.adapter, model.adapter_revision, "model")
        else:
            own = [name for name in ADAPTER_FILES if (path / name).is_file()]
            inputs.checkpoint("adapter", path, own)


def measures_base(recipe: Recipe, suite: Suite | None) -> bool:
    """Whether the model that was fine-tuned is measured too, for retention.

    Not beside GGUF: what serves GGUF would need the base in that form, too.
    """
    return wants_base(recipe, suite) and recipe.quantize.effective_format != "gguf"


def wants_base(recipe: Recipe, suite: Suite | None) -> bool:
    """Whether the recipe asks for it."""
    evaluate = recipe.evaluate
    wanted = evaluate is not None and evaluate.retention and recipe.model.base is not None
    return wanted and suite is not None and bool(suite.tasks)


def _resolve_base(model: Model, folder: Path, inputs: _Inputs) -> None:
    assert model.base is not None
    path = find_checkpoint(model.base, folder, "model.base")
    if path is None:
        inputs.hub("base", model.base, model.base_revision, "model")
    else:
        inputs.checkpoint("base", path, checkpoint_files(path))


def _resolve_signer(sign: Sign, inputs: _Inputs) -> None:
    """By the public key; absent where the key cannot be read, which preflight explains."""
    from quantize import signing  # imports cryptography: only recipes that sign pay for it

    with suppress(QuantizeError):
        inputs.digests["sign"] = signing.identify(sign)


def _resolve_template(text: str, folder: Path, inputs: _Inputs) -> None:
    path = find_path(text, folder, "publish.card_template")
    if path is None or not path.is_file():
        raise SourceError(
            f"publish.card_template: there is no file {text!r} in {folder}",
            "correct publish.card_template; a relative path starts at the recipe file",
        )
    inputs.add("card_template", inputs.cache.sha256(path), path)


def _check_task_names(evaluate: Evaluate, suite: Suite) -> None:
    """Margins and gate may name the suite's tasks alone."""
    known = [task.name for task in suite.tasks]
    named = [("margins.tasks", name) for name in evaluate.margins.tasks]
    named += [("gate.tasks", name) for name in evaluate.gate.tasks or ()]
    for key, name in named:
        if name not in known:
            raise UsageError(
                f"evaluate.{key} names {name!r}, and suite {suite.name} has no such task",
                f"its tasks: {', '.join(known) or 'none'}",
            )


def _resolve_suite(evaluate: Evaluate, folder: Path, inputs: _Inputs) -> Suite:
    suite_path = find_suite(evaluate.suite, folder)
    suite = load_suite(suite_path)
    suite_folder = suite_path.absolute().parent
    inputs.add("suite", contents_digest(suite), suite_path)
    with inputs.faults.kept():
        prompts_path = find_prompts(suite.smoke, suite_folder)
        inputs.add("prompts", contents_digest(load_prompts(prompts_path)), prompts_path)
    with inputs.faults.kept():
        if suite.perplexity is not None:
            text = suite.perplexity
            path = find_data(text.text, suite_folder, f"perplexity.text of suite {suite.name}")
            inputs.data("text", path, text.text, text.revision)
    with inputs.faults.kept():
        _resolve_health(suite, suite_path, inputs)
    with inputs.faults.kept():
        _resolve_tasks(suite, suite_path, inputs)
    return suite


def _resolve_health(suite: Suite, suite_path: Path, inputs: _Inputs) -> None:
    if suite.health is None:
        return
    folder = suite_path.absolute().parent
    path = find_data(suite.health.prompts, folder, f"health of suite {suite.name}")
    if path is None:
        raise SourceError(
            f"suite {suite.name}: there is no file of prompts {suite.health.prompts!r}",
            f"correct health.prompts in {suite_path}",
        )
    inputs.data("health", path, suite.health.prompts, None)


def _resolve_tasks(suite: Suite, suite_path: Path, inputs: _Inputs) -> None:
    if suite.tasks_folder is None:
        return
    tasks = find_path(
        suite.tasks_folder, suite_path.absolute().parent, f"suite {suite.name}: tasks_folder"
    )
    if tasks is None or not tasks.is_dir():
        raise SourceError(
            f"suite {suite.name}: there is no tasks folder {suite.tasks_folder!r}",
            f"correct tasks_folder in {suite_path}",
        )
    names = task_files(tasks, [task.name for task in suite.tasks])
    inputs.add("tasks", inputs.cache.tree(tasks, names), tasks)


def contents_digest(file: Suite | Prompts) -> str:
    """What a suite or prompts file says, without its description for people."""
    return digest(file.model_dump(mode="json", exclude={"description"}))


def task_files(folder: Path, tasks: Iterable[str]) -> list[str]:
    """Files below `folder` that the own ones among `tasks` consist of, relative to it.

    An own task is one that a YAML file defines (`task: name`); all files beside that one count, and
    so do those at the top of `folder`, which tasks may include.
    """
    wanted = set(tasks)
    homes = {folder}
    for path in folder.rglob("*.yaml"):
        if wanted & _tasks_in(path):
            homes.add(path.parent)
    names = []
    for path in folder.rglob("*"):
        inside = path.parent in homes or (homes - {folder}) & set(path.parents)
        if inside and path.is_file() and "__pycache__" not in path.parts:
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def own_task_names(folder: Path) -> set[str]:
    """Names of the tasks that the YAML files below `folder` define."""
    found: set[str] = set()
    for path in folder.rglob("*.yaml"):
        found |= _tasks_in(path)
    return found


def _tasks_in(path: Path) -> set[str]:
    """Names of the tasks and groups that one YAML file defines; none if it is no file."""
    if not path.is_file():
        return set()
    text = read_bytes(path, TEXT_LIMIT_BYTES).decode("utf-8", "replace")
    return set(TASK_NAME.findall(text))


def _can_be_data(name: str, path: Path) -> bool:
    """Whether a file is worth hashing; preflight says what is wrong with one that is not."""
    if name == "calibration":
        return not check_calibration(path, has_chat_template=None)
    limit = HELD_OUT_LIMIT_BYTES if name in ("text", "own_text") else TABLE_LIMIT_BYTES
    return path.stat().st_size <= limit


def _is_unsound(name: str, folder: Path, files: list[str]) -> bool:
    """Whether the folder's entries or the headers of its weights say that hashing is no use."""
    if name != "adapter":
        return bool(unsound_files(folder) or read_weights(folder, files)[2])
    if unsound_files(folder, ADAPTER_FILES):
        return True
    try:
        for file in files:
            if file.endswith(".safetensors"):
                read_header(folder / file)
    except SourceError:
        return True
    return False


@dataclass
class _Inputs:
    """Collects digests and paths by input name."""

    cache: HashCache
    online: bool
    hash_limit_bytes: int | None
    faults: Faults
    digests: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, value: str, path: Path) -> None:
        """An input whose contents are known."""
        self.digests[name], self.paths[name] = value, path

    def data(self, name: str, path: Path | None, text: str, revision: str | None) -> None:
        """A local data file, or a data set on the Hub."""
        if path is None:
            self.hub(name, text, revision, "dataset")
        else:
            self.paths[name] = path
            if not self.cache.unknown_bytes([path]) or _can_be_data(name, path):
                self.add(name, self.cache.sha256(path), path)

    def checkpoint(self, name: str, folder: Path, files: list[str]) -> None:
        """A local checkpoint or adapter; the digest is absent when it is too large to hash now."""
        self.paths[name] = folder
        if not files:
            raise SourceError(
                f"{folder} holds no {'adapter' if name == 'adapter' else 'checkpoint'} files",
                f"correct model.{'source' if name == 'model' else name}",
            )
        if _is_unsound(name, folder, files):
            return  # preflight says what is wrong; a file that lies may have a terabyte of holes
        limit = self.hash_limit_bytes
        if limit is None or self.cache.unknown_bytes(folder / file for file in files) <= limit:
            self.digests[name] = self.cache.tree(folder, files)

    def hub(
        self, name: str, repo: str, revision: str | None, kind: Literal["model", "dataset"]
    ) -> None:
        """A Hub repository: ``repo@commit`` when the commit is pinned or may be looked up."""
        commit = revision if revision and COMMIT.fullmatch(revision) else None
        down = any(isinstance(error, TransientError) for error in self.faults.errors)
        if commit is None and self.online and not down:  # once is enough to tell
            from quantize.hub import (
                repository as hub,  # imports an HTTP client: only runs that go online pay for it
            )

            commit = hub.resolve_revision(hub.access_from_environment(), repo, revision, kind)
        if commit is not None:
            self.digests[name] = f"{repo}@{commit}"
