"""Calls that fail or are slow, by strace's injection: each class has its end, and none a traceback.

A case names the stage that is run, the calls that fail, the files they fail for (below the store or
the source; strace compares whole paths), and the exit codes that are right. Afterwards the same
command runs undisturbed and must give the undisturbed run's artifacts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kills import points
from tests.faults.kills.bench import Bench, Broken
from tests.faults.kills.checks import difference

READS = "read,pread64,preadv,readv"
OPEN = "openat,open"


@dataclass(frozen=True)
class Case:
    """`calls` on any of `paths` give `fault` (strace's words)."""

    name: str
    stage: str
    calls: str
    fault: str
    paths: tuple[str, ...]  # {store}, {KIND}: its artifact, {staging} of the stage, {work} in it
    codes: tuple[int, ...]


def cases() -> list[Case]:
    """Every class of refusal at a read of an input, and at a write of the stage's own."""
    own = ("{staging}/files/audit.json", "{staging}/files/.audit.json", "{staging}/files")
    scratch = ("{work}/stream/part-1.safetensors.tmp",)
    found = [
        # an input that cannot be read is damaged: it is needed, and this command may not make it
        Case(
            "read of a manifest", "audit", READS, "error=EIO", ("{compress}/manifest.json",), (2,)
        ),
        Case("read of an input", "audit", READS, "error=EIO", ("{compress}/compress.json",), (2,)),
        Case("sync of the result", "audit", "fsync", "error=EIO", own, (4,)),
        Case("sync in a worker", "compress", "fsync", "error=EIO", scratch, (4,)),
        Case("slow syncs", "audit", "fsync,rename,mkdir", "delay_enter=300000", (), (0,)),
        Case("slow writes in a worker", "compress", "fsync,rename", "delay_enter=300000", (), (0,)),
    ]
    for error in ("EROFS", "EACCES", "EMFILE", "ENOSPC", "EIO", "EDQUOT"):
        paths = ("{staging}/files",)
        found.append(Case(f"mkdir {error}", "audit", "mkdir", f"error={error}", paths, (4,)))
        journal = ("{work}/stream/journal.jsonl",)
        found.append(Case(f"open {error}", "compress", OPEN, f"error={error}", journal, (4,)))
    return found


def try_case(bench: Bench, case: Case) -> int:
    """Run the case and then the command undisturbed; the faulty run's exit code."""
    bench.reset(case.stage)
    trace = bench.folder / "trace.txt"
    under = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-q",
        "-o",
        str(trace),
        "-e",
        "signal=none",
        "-s",
        "0",
    ]
    under += ["-e", f"trace={case.calls}", "-e", f"inject={case.calls}:{case.fault}"]
    for path in case.paths:
        under += ["-P", _place(bench, case.stage, path)]
    ended = bench.run("--only", case.stage, under=under, seconds=600)
    if "INJECTED" not in trace.read_text(errors="replace") and "DELAYED" not in trace.read_text(
        errors="replace"
    ):
        raise Broken("nothing was injected")
    if "Traceback" in ended.err:
        raise Broken(f"a traceback: {ended.err[-1500:]}")
    if ended.code not in case.codes:
        raise Broken(f"ended with {ended.code}, not {case.codes}: {ended.err[-800:]}")
    for artifact in bench.store.artifacts():
        if problems := artifact.damage(hash_files=True):
            raise Broken(f"{artifact.path}: {problems}")
    again = bench.run("--only", case.stage, seconds=600)
    artifact = bench.store.get(*bench.stages[case.stage])
    if again.code != 0 or artifact is None:
        raise Broken(f"undisturbed it ended with {again.code}: {again.err[-800:]}")
    if found := difference(bench.reference(case.stage), artifact):
        raise Broken(f"another artifact: {found}")
    return ended.code


def _place(bench: Bench, stage: str, path: str) -> str:
    kind, key = bench.stages[stage]
    names: dict[str, Path] = {
        kind: bench.store.path(kind, key) for kind, key in bench.stages.values()
    }
    staging = bench.store.root / kind / ".staging" / key
    places = {"store": bench.store.root, "staging": staging, "work": staging / "work"}
    return path.format(**places, **names)


def campaign(bench: Bench, say: Callable[[str], None], only: str = "") -> int:
    """All cases; the number of broken promises."""
    broken = 0
    for case in cases():
        if only in f"{case.stage}: {case.name}":
            try:
                say(f"{case.stage}: {case.name}: exit {try_case(bench, case)}")
            except Broken as problem:
                broken += 1
                say(f"BROKEN {case.stage}: {case.name}: {problem}")
    return broken


def why_not() -> str:
    """Why this machine cannot inject faults; empty where it can."""
    return points.why_not()
