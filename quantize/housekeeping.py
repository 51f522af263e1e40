"""What the commands beside `run` and `plan` do: environments, doctor, garbage collection."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantize.environments import ENVIRONMENTS, Environments, accelerator, cache_folder
from quantize.in_use import collecting
from quantize.progress import Progress
from quantize.room import written_bytes
from quantize.session import Session, Write, choose_view, open_store


def environments() -> Environments:
    """The environments of this machine, without a recipe's overrides."""
    return Environments(accelerator(), cache_folder())


def install(recipe: str | None, write: Write) -> Iterator[str]:
    """Install what a recipe needs, or everything; yields a line an environment."""
    if recipe is None:
        installed, names = environments(), sorted(ENVIRONMENTS)
    else:
        session = Session.open(recipe, (), None, online=False)
        installed = session.environments
        names = sorted({name for entry in session.plan.stages for name in entry.environments})
    log = cache_folder() / "logs" / "environments.log"
    installed.package_path()  # an image is built by root and run by others
    progress = Progress(choose_view(False, write))
    try:
        for name in names:
            ready = installed.installed(name)
            python = installed.install(name, progress, log)
            yield f"{name}: {'was ready' if ready else 'installed'}: {python}"
    finally:
        progress.close()


def doctor() -> Iterator[tuple[str, str]]:
    """(environment, what is wrong with it) for every installed environment."""
    here = environments()
    log = cache_folder() / "logs" / "doctor.log"
    for name, environment in sorted(ENVIRONMENTS.items()):
        if here.installed(name):
            yield name, here.health_of(environment, here.python(name), log)


def collect_garbage(
    folder: Path | None, recipes: Sequence[str], *, dry_run: bool
) -> Iterator[tuple[Path, int]]:
    """Remove leftovers and old run folders, and, given `recipes`, what none of them uses.

    What runs under way on this store use is kept, whatever their recipes.
    """
    store = open_store(folder)
    wanted = {
        (entry.kind, entry.key)
        for recipe in recipes
        for entry in Session.open(recipe, (), folder, online=True).plan.stages
    }
    if not store.root.is_dir():
        return
    with collecting(store.root) as in_use:
        unused: list[Path] = []
        if recipes:
            kept = wanted | in_use.artifacts
            unused = [
                artifact.path
                for artifact in store.artifacts()
                if (artifact.manifest.kind, artifact.manifest.key) not in kept
            ]
        old_runs = [path for path in store.old_runs() if path not in in_use.folders]
        for path in itertools.chain(store.leftovers(), old_runs, unused):
            size = written_bytes(path)
            if not dry_run:
                shutil.rmtree(path)
            yield path, size
