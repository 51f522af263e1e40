"""What `quantize convert` does: a quantized checkpoint → a folder with it in another format.

The checkpoint may be anyone's: it is read with the care of :mod:`quantize.checkpoint`, no code of
it is run, and one that brings code is refused. The folder is complete or absent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from quantize import stop
from quantize.artifact_formats import FORMATS
from quantize.checkpoint import model_folder
from quantize.errors import UsageError
from quantize.planner import result_stage
from quantize.printable import shortened
from quantize.refusals import refusals
from quantize.remote_code import LET_IN
from quantize.repacking import Repacked, repack
from quantize.resources import find_recipe
from quantize.rewriting import OnProgress
from quantize.session import Session
from quantize.store import Store, fsync


@dataclass(frozen=True)
class Found:
    """A quantized checkpoint's folder, what to call it, and whether its code was let in before."""

    folder: Path
    name: str
    code: str | None = None


def find_artifact(text: str, store: Store) -> Found:
    """The checkpoint that `text` means: a folder, or a recipe whose result is in the store."""
    given = Path(text).expanduser()
    if given.is_dir():
        inner = given / "model"  # an artifact's folder in the store
        whole = (given / "config.json").exists() or not inner.is_dir()
        return Found(given if whole else inner, given.resolve().name)
    if given.exists() and given.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{shortened(text)} is a file", "name a checkpoint's folder or a recipe")
    try:
        find_recipe(text)
    except UsageError as error:
        raise UsageError(
            f"there is no folder and no recipe {shortened(text)!r}",
            "name a quantized checkpoint's folder, or a recipe whose result is in the store",
        ) from error
    return _result_of(text, store)


def _result_of(recipe: str, store: Store) -> Found:
    session = Session.open(recipe, (), store.root, online=False)
    stage = result_stage(session.resolved)
    entry = session.plan.stage(stage)
    artifact = store.get(entry.kind, entry.key) if entry.key is not None else None
    if artifact is None:
        raise UsageError(
            f"the result of {recipe} is not in the store {store.root} ({entry.reason})",
            f"quantize run {recipe} --until {stage}",
        )
    return Found(model_folder(artifact), session.resolved.recipe.name, LET_IN)


def convert(
    found: Found, name: str, output: Path | None, on_progress: OnProgress, *, force: bool
) -> tuple[Path, Repacked]:
    """Write the checkpoint in the format `name` to `output`; where it is now, and what was done.

    UsageError for an output that would overwrite, SourceError for a checkpoint that cannot be
    read or that the format cannot hold, ResourceError where the disk refuses.
    """
    target = (output or Path(f"{found.name}-{name}")).expanduser().absolute()
    _require_apart(target, found.folder)
    _require_free(target, force)
    new = target.with_name(f".{target.name}.quantize-new")
    with refusals(f"cannot write {target}", target.parent):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            done = repack(found.folder, new, FORMATS[name], on_progress, code=found.code)
            for path in (*new.iterdir(), new):
                fsync(path)
            _into_place(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return target, done


def _require_apart(target: Path, source: Path) -> None:
    place, taken = target.resolve(), source.resolve()
    if place == taken or place in taken.parents or taken in place.parents:
        raise UsageError(
            f"{target} overlaps {source}, which is read", "name another folder with --output"
        )


def _require_free(target: Path, force: bool) -> None:
    """Nothing is there; or, with `force`, a checkpoint."""
    if not target.exists() and not target.is_symlink():
        return
    hint = "name another folder with --output"
    if not force:
        raise UsageError(f"{target} exists", f"{hint}, or add --force")
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target} is no folder", hint)
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise UsageError(f"{target} holds other things than a checkpoint", hint)


def _into_place(new: Path, target: Path) -> None:
    """Rename; what `--force` replaces goes when the new folder is there."""
    old = target.with_name(f".{target.name}.quantize-old")
    shutil.rmtree(old, ignore_errors=True)
    with stop.held():
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
