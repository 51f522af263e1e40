"""What a stage is given and what it must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantize.plan import StageEntry
from quantize.recipe import Recipe
from quantize.store import Artifact, Store
from quantize.suite import Suite

if TYPE_CHECKING:
    from quantize.runner import Runner


@dataclass(frozen=True)
class Resolved:
    """The recipe with everything outside it that its result depends on, read once, up front.

    `digests` maps a name (`model`, `adapter`, `base`, `calibration`, `suite`, `text`, ...;
    see :func:`quantize.resolve.resolve`)
    to what identifies that input: sha256 of content for files, the commit for the Hub. A name that
    is absent cannot be known yet; the stages that need it are `pending` in the plan.
    """

    recipe: Recipe
    folder: Path  # relative paths of the recipe start here
    accelerator: str  # cpu or cuda
    digests: Mapping[str, str]
    paths: Mapping[str, Path] = field(default_factory=dict)  # of local inputs, by the same names
    suite: Suite | None = None

    def commit(self, name: str) -> str | None:
        """The pinned commit of a Hub input, None for a local one; a KeyError if not resolved."""
        if name in self.paths:
            return None
        return self.digests[name].rpartition("@")[2]


@dataclass
class StageContext:
    """One execution of one stage."""

    entry: StageEntry
    resolved: Resolved
    inputs: Mapping[str, Artifact]  # by role, see StageEntry.inputs
    files: Path  # becomes the artifact
    work: Path  # survives a kill, belongs to this key
    runner: Runner  # the one place that starts processes
    store: Store
    versions: dict[str, str] = field(default_factory=dict)  # written to the manifest
    notes: list[str] = field(default_factory=list)  # written to the manifest and shown

    @property
    def recipe(self) -> Recipe:
        """The recipe being run."""
        return self.resolved.recipe


class Stage(Protocol):
    """A module of this package: these four names at its top level.

    A module may also offer `stale(resolved, entry_id, artifact) -> str | None`: why a finished
    artifact must be made again although its key is the same (a published folder that somebody
    changed).
    """

    VERSION: int  # raised whenever the same inputs give another result

    def environments(self, resolved: Resolved, entry_id: str) -> tuple[str, ...]:
        """Names of the environments whose locks are part of the key."""
        ...

    def key_inputs(self, resolved: Resolved, entry_id: str) -> dict[str, Any]:
        """Everything the result depends on beyond the inputs' keys, code version and locks."""
        ...

    def run(self, context: StageContext) -> None:
        """Write the artifact's files into `context.files`."""
        ...
