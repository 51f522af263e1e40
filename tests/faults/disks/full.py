"""A store on a tmpfs of every size from nothing to enough: what a full disk costs.

The preflight is made to believe in an empty disk (:data:`DRIVER`), so that the disk is full in the
middle of the work: as when another program fills it. That the preflight itself stops a run on a
small disk is one more case.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kills.bench import Bench, Broken, Ended
from tests.faults.kills.checks import difference

DRIVER = """
import collections, shutil, sys
usage = collections.namedtuple("usage", "total used free")(1 << 50, 0, 1 << 50)
shutil.disk_usage = lambda place: usage
from quantize.cli import main
main()
"""
ENOUGH_BYTES = 256 << 20
SAYS = re.compile(r"error: .*the disk is full|error: cannot publish to|error: cannot write to")


@dataclass(frozen=True)
class Found:
    """How far a run came on a disk of one size."""

    size_bytes: int
    code: int
    done: tuple[str, ...]  # stages with a whole artifact


def why_not() -> str:
    """Why no tmpfs can be mounted here; empty where one can."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting a small disk needs root"
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode:
            return f"a small disk cannot be mounted: {tried.stderr.strip()}"
        subprocess.run(["umount", folder], check=True)
    return ""


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """A tmpfs at `place`, with the mount options, until the block is left."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class FullDisk:
    """Runs of one bench whose store, and published folder, lie on a small disk."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.disk = bench.folder / "disk"

    def run(self, size_bytes: int, options: str = "") -> Found:
        """Run until the disk is full, check, make room, run again, check; how far it came."""
        bench = self.bench
        # tmpfs counts whole pages, and 0 is no limit
        size = f"size={max(size_bytes, 4096)}{options}"
        with small_disk(self.disk, size), _moved(bench, self.disk):
            ended = self._quantize(DRIVER)
            done = self._check(ended)
            room = f"remount,size={ENOUGH_BYTES},nr_inodes=0"
            subprocess.run(["mount", "-o", room, str(self.disk)], check=True)
            self._check_again(self._quantize(DRIVER), done)
        return Found(size_bytes, ended.code, done)

    def preflight(self, size_bytes: int) -> str:
        """What an undisturbed run says on a small disk, before any stage."""
        with small_disk(self.disk, f"size={size_bytes}"), _moved(self.bench, self.disk):
            ended = self._quantize("from quantize.cli import main; main()")
            if ended.code != 4 or "[1/" in ended.err or list(self.bench.store.artifacts()):
                raise Broken(f"the preflight let it pass: {ended.code} {ended.err[-500:]}")
            return ended.err

    def _quantize(self, code: str) -> Ended:
        return self.bench.run(python=(sys.executable, "-c", code))

    def _check(self, ended: Ended) -> tuple[str, ...]:
        bench = self.bench
        if "Traceback" in ended.err:
            raise Broken(f"a traceback: {ended.err[-1500:]}")
        if ended.code == 4:
            if not SAYS.search(ended.err) or "bytes are free at" not in ended.err:
                raise Broken(f"the message does not say it: {ended.err[-800:]}")
        elif ended.code != 0:
            raise Broken(f"ended with {ended.code}: {ended.err[-800:]}")
        for artifact in bench.store.artifacts():
            if problems := artifact.damage(hash_files=True):
                raise Broken(f"{artifact.path}: {problems}")
        return tuple(name for name in bench.stages if bench.store.get(*bench.stages[name]))

    def _check_again(self, ended: Ended, done: Sequence[str]) -> None:
        if ended.code != 0:
            raise Broken(f"with room it ended with {ended.code}: {ended.err[-800:]}")
        states = ended.states()
        if again := [name for name in done if states[name] != "hit"]:
            raise Broken(f"finished stages ran again: {again}")
        for name, place in self.bench.stages.items():
            artifact = self.bench.store.get(*place)
            if artifact is None or (name != "publish" and self._differs(name)):
                raise Broken(f"{name} is not what it is undisturbed")

    def _differs(self, name: str) -> list[str]:
        artifact = self.bench.store.get(*self.bench.stages[name])
        assert artifact is not None
        return difference(self.bench.reference(name), artifact)


@contextmanager
def _moved(bench: Bench, place: Path) -> Iterator[None]:
    """The bench's store and published folder at another place."""
    from quantize.store import Store

    store, published, stages = bench.store, bench.published, bench.stages
    bench.store, bench.published = Store(place / "store"), place / "out"
    bench.stages = bench.planned()  # the published folder is part of a key
    try:
        yield
    finally:
        bench.store, bench.published, bench.stages = store, published, stages


def sizes(most_bytes: int, steps: int) -> list[int]:
    """From nothing to `most_bytes`, in equal steps."""
    return [most_bytes * step // steps for step in range(steps + 1)]


def campaign(bench: Bench, steps: int, say: Callable[[str], None]) -> int:
    """Every size, few inodes, and the preflight; the number of broken promises."""
    disk, broken = FullDisk(bench), 0
    most = sum(a.manifest.total_bytes for a in bench.clean.artifacts()) * 3
    cases: list[tuple[int, str]] = [(size, "") for size in sizes(most, steps)]
    cases += [(ENOUGH_BYTES, f",nr_inodes={inodes}") for inodes in (10, 40, 80)]
    for size, options in cases:
        try:
            found = disk.run(size, options)
            say(f"{size} bytes{options}: exit {found.code}, done: {', '.join(found.done) or '-'}")
        except Broken as problem:
            broken += 1
            say(f"BROKEN {size} bytes{options}: {problem}")
    said = disk.preflight(100 << 20)
    say(f"preflight: {said.strip().splitlines()[0]}")
    return broken
