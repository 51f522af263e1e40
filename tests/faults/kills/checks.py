"""What must hold after a kill, and after the next run."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from quantize.store import Artifact
from tests.faults.kills.bench import Bench, Broken, Ended, read_json

TIMES = {"seconds", "start_seconds", "peak_memory_bytes", "device"}
"""Keys of records that are the clock's or the machine's; and of receipts, `changed`."""
SAID_OTHERWISE = TIMES | {"changed"}
LOGPROB_NATS = 0.05
"""How far two measurements of one token may be apart: batches are formed as requests arrive."""


@dataclass
class Left:
    """What the kill left behind, as far as the next run must not make it again."""

    complete: bool  # the artifact is whole
    layers: dict[int, float] = field(default_factory=dict)  # journalled → seconds it took
    begun: int = 0  # layers that were begun
    parts: dict[str, float] = field(default_factory=dict)  # of a measurement → seconds

    @property
    def lost_layers(self) -> int:
        """Begun, and to be begun again."""
        return max(0, self.begun - len(self.layers))


def after_the_kill(bench: Bench, stage: str, ended: Ended) -> Left:
    """Complete or absent; earlier artifacts untouched; a survivor of the kill says what was."""
    if ended.code not in (-9, 137, 0, 4, 75):
        raise Broken(f"ended with {ended.code}: {ended.err[-800:]}")
    if "Traceback" in ended.err:
        raise Broken(f"a traceback: {ended.err[-800:]}")
    for artifact in bench.store.artifacts():
        if problems := artifact.damage(hash_files=True):
            raise Broken(f"{artifact.path.name[:12]} is taken for complete: {problems}")
    for name in list(bench.stages)[: list(bench.stages).index(stage)]:
        if bench.store.get(*bench.stages[name]) is None:
            raise Broken(f"{name} is gone")
    if bench.published.exists() and _tree(bench.published) != _tree(bench.clean_published):
        raise Broken("half a folder is published")
    left = Left(bench.store.get(*bench.stages[stage]) is not None)
    kind, key = bench.stages[stage]
    work = bench.store.root / kind / ".staging" / key / "work"
    _read_engine(work, left)
    for path in work.glob("part-*.json"):
        left.parts[path.name] = read_json(path)["seconds"]
    if left.lost_layers > 1:
        raise Broken(f"{left.lost_layers} layers are lost")
    return left


def _read_engine(work: Path, left: Left) -> None:
    journal = work / "stream" / "journal.jsonl"
    if journal.exists():
        for line in _whole(journal)[1:]:
            if line["part"] != "outside":
                left.layers[line["layer"]] = line["seconds"]
    events = work / "compress.events.jsonl"
    if events.exists():
        done = [event["done"] for event in _whole(events) if event["kind"] == "progress"]
        left.begun = math.ceil(max(done, default=0.0))


def _whole(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def after_the_next_run(bench: Bench, stage: str, left: Left, ended: Ended) -> None:
    """Done, with the undisturbed run's manifest; nothing skipped, nothing finished made again."""
    if ended.code != 0:
        raise Broken(f"the next run ended with {ended.code}: {ended.err[-800:]}")
    state = ended.states()[stage]
    if state != ("hit" if left.complete else "ran"):
        raise Broken(f"the next run says {state}, and the artifact was complete: {left.complete}")
    artifact = bench.store.get(*bench.stages[stage])
    if artifact is None:
        raise Broken("the next run ended well without the artifact")
    if problems := artifact.damage(hash_files=True):
        raise Broken(f"the next run left damage: {problems}")
    if found := difference(bench.reference(stage), artifact):
        raise Broken(f"another manifest: {found}")
    if stage == "publish" and _tree(bench.published) != _tree(bench.clean_published):
        raise Broken("another folder is published")
    _nothing_made_again(artifact, left)
    _nothing_left_over(bench, stage)


def _nothing_made_again(artifact: Artifact, left: Left) -> None:
    """The seconds that finished layers and parts took are still those of the killed run."""
    if left.layers:
        took = {e["layer"]: e["seconds"] for e in artifact.json("compress.json")["layers"]}
        again = [layer for layer, seconds in left.layers.items() if took[layer] != seconds]
        if again:
            raise Broken(f"finished layers were made again: {again}")
    if left.parts:
        took = artifact.json("record.json")["seconds"]
        kept = {round(seconds, 2) for seconds in took.values()}
        again_parts = [n for n, seconds in left.parts.items() if round(seconds, 2) not in kept]
        if again_parts:
            raise Broken(f"finished parts were measured again: {again_parts}")


def _nothing_left_over(bench: Bench, stage: str) -> None:
    """Neither scratch nor a lock that is held."""
    folder = bench.store.root / bench.stages[stage][0] / ".staging"
    scratch = [path.name for path in folder.glob("*") if path.is_dir()]
    if scratch:
        raise Broken(f"scratch is left: {scratch}")
    for path in bench.store.root.rglob("*.lock"):
        try:
            with FileLock(path).acquire(timeout=0):
                pass
        except Timeout as error:
            raise Broken(f"{path} is still held") from error


def difference(reference: Artifact, artifact: Artifact) -> list[str]:
    """Names of files that are not those of the reference, but for times; logprobs: nearly."""
    ours = {entry.name: entry.sha256 for entry in artifact.manifest.files}
    theirs = {entry.name: entry.sha256 for entry in reference.manifest.files}
    found = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            pair = (reference.path / name, artifact.path / name)
            if reference.manifest.kind == "measure":
                same = _measured_alike(*pair)
            else:
                same = name.endswith(".json") and _without_times(*pair)
            if not same:
                found.append(name)
    return found


def _without_times(one: Path, other: Path) -> bool:
    return bool(_timeless(read_json(one)) == _timeless(read_json(other)))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in SAID_OTHERWISE}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _measured_alike(one: Path, other: Path) -> bool:
    """The same tokens with nearly the same logprobs; of records, the same keys."""
    if one.suffix == ".npz":
        with np.load(io.BytesIO(one.read_bytes())) as a, np.load(other) as b:
            return sorted(a.files) == sorted(b.files) and all(
                a[name].shape == b[name].shape
                and (a[name].dtype.kind != "f" or _near(a[name], b[name]))
                for name in a.files
            )
    if one.suffix == ".json":
        return bool(read_json(one).keys() == read_json(other).keys())
    return len(one.read_text().splitlines()) == len(other.read_text().splitlines())


def _near(a: Any, b: Any) -> bool:
    finite = np.isfinite(a) & np.isfinite(b)
    return bool(np.quantile(np.abs(a[finite] - b[finite]), 0.99) < LOGPROB_NATS)


def _tree(folder: Path) -> dict[str, bytes]:
    """Contents by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
