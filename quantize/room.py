"""How much a stage still has to write, for the message about a full disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from quantize.checkpoint import model_folder, read_checkpoint
from quantize.engines import ENGINES
from quantize.errors import QuantizeError
from quantize.plan import StageEntry
from quantize.source_checks import promised_bytes
from quantize.stages.base import Resolved
from quantize.store import Artifact, Store


def room_needed(
    entry: StageEntry, resolved: Resolved, store: Store, artifacts: Mapping[str, Artifact]
) -> int | None:
    """Bytes that the stage's result takes, less what is staged already; None if it is not known.

    Compress and convert: the tensors that the scheme promises. Publish: what is copied. A merge:
    the weights in BF16. Of other stages nothing is known beforehand; what they write is small.
    """
    whole: int | None = None
    with suppress(QuantizeError, OSError, KeyError):
        whole = _whole(entry, resolved, artifacts)
    if whole is None:
        return None
    staged = store.root / entry.kind / ".staging" / str(entry.key)
    # finished layers lie in the scratch folder until they are assembled, then in both by one inode
    layers = sum(path.stat().st_size for path in staged.glob("work/stream/part-*.safetensors"))
    return max(whole - max(written_bytes(staged / "files"), layers), 1)


def _whole(entry: StageEntry, resolved: Resolved, artifacts: Mapping[str, Artifact]) -> int | None:
    if entry.kind in ("compress", "adopt", "convert"):
        source, recipe = read_checkpoint(model_folder(artifacts["fetch"])), resolved.recipe
        own = ENGINES[recipe.quantize.engine].FORMAT
        return promised_bytes(source, recipe, own if entry.kind == "compress" else None)
    if entry.kind == "publish" and resolved.recipe.publish.folder is not None:
        made = (artifacts.get(stage) for stage in ("convert", "adopt", "compress"))
        result = next(artifact for artifact in made if artifact is not None)
        return result.manifest.total_bytes + artifacts["card"].manifest.total_bytes
    if entry.kind == "fetch" and resolved.recipe.model.merges and "model" in resolved.paths:
        return 2 * read_checkpoint(resolved.paths["model"]).parameters
    return None


def written_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what goes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
