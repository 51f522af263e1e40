"""The executor on stages of a few lines that write real artifacts, killed and run side by side."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from child_process import ROOT, helper

from quantize.environments import Environments
from quantize.errors import GateError, ResourceError, UsageError
from quantize.execute import Outcome, execute, places, select
from quantize.keys import digest
from quantize.plan import Plan, StageEntry
from quantize.planner import STAGES, with_status
from quantize.progress import LineView, Progress
from quantize.protocol import write_json
from quantize.recipe import Recipe
from quantize.runner import Runner
from quantize.stages.base import Resolved, StageContext
from quantize.store import Artifact, Store

GRAPH: dict[str, dict[str, str]] = {
    "fetch": {},
    "compress": {"source": "fetch"},
    "compare": {"source": "fetch", "result": "compress"},
    "card": {"compare": "compare"},
    "publish": {"compress": "compress", "card": "card", "compare": "compare"},
}
ALL = tuple(GRAPH)
RECIPE = Recipe.model_validate(
    {"version": 1, "name": "r", "model": {"source": "o/n"}, "quantize": {"method": "rtn"}}
)
RESOLVED = Resolved(RECIPE, Path(), "cpu", {})


def passed(value: float) -> dict[str, Any]:
    says = f"perplexity is ×{value}, the limit is 1.1"
    gate = {"name": "perplexity", "says": says, "passed": value <= 1.1}
    return {"gates": [gate]}


@dataclass
class Toy:
    """One stage: says that it runs, and writes what its inputs were."""

    kind: str
    diary: Path  # a line for every run of a stage, by whatever process
    before: Callable[[StageContext], None] = lambda context: None
    value: float = 1.0  # of compare's gate
    VERSION: int = 1

    def environments(self, resolved: Resolved, entry_id: str) -> tuple[str, ...]:
        return ()

    def key_inputs(self, resolved: Resolved, entry_id: str) -> dict[str, Any]:
        return {}

    def run(self, context: StageContext) -> None:
        with self.diary.open("a") as file:
            file.write(context.entry.id + "\n")
        self.before(context)
        read = {role: artifact.manifest.key for role, artifact in context.inputs.items()}
        write_json(context.files / "inputs.json", read)
        context.versions["toy"] = "1"
        context.notes.append(f"note of {self.kind}")
        match self.kind:
            case "compare":
                write_json(context.files / "record.json", passed(self.value))
            case "card":
                write_json(context.files / "record.json", {})
                (context.files / "README.md").write_text("# card\n")
            case "publish":
                target = {"kind": "folder", "path": "/somewhere"}
                write_json(context.files / "receipt.json", {"targets": [target]})


class StaleToy(Toy):
    """A stage whose artifact somebody has changed outside the store."""

    why: str | None = None

    def stale(self, resolved: Resolved, entry_id: str, artifact: Artifact) -> str | None:
        return self.why


def make_plan(graph: Mapping[str, Mapping[str, str]] = GRAPH) -> Plan:
    entries: dict[str, StageEntry] = {}
    for name, inputs in graph.items():
        key_inputs = {"stage": name, "inputs": {r: entries[i].key for r, i in inputs.items()}}
        entries[name] = StageEntry(name, name, digest(key_inputs), key_inputs, inputs)
    return Plan("r", "cpu", tuple(entries.values()))


@dataclass
class Bench:
    """A store, toy stages, and one run after another."""

    folder: Path
    plan: Plan = field(default_factory=make_plan)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "store")
        self.toys = {kind: StaleToy(kind, self.folder / "diary") for kind in STAGES}

    def run(self, selected: Sequence[str] = ALL) -> Outcome:
        environments = Environments("cpu", self.folder / "cache")
        progress = Progress(LineView(self.lines.append))
        self.runner = Runner(environments, self.folder / "logs", progress)
        self.outcome = Outcome()
        known = with_status(self.plan, self.store)
        execute(known, RESOLVED, self.store, self.runner, selected, self.outcome)
        return self.outcome

    def states(self) -> dict[str, str]:
        return {stage.id: stage.state for stage in self.outcome.stages}

    def diary(self) -> list[str]:
        path = self.folder / "diary"
        return path.read_text().split() if path.exists() else []

    def made(self, stage: str) -> Artifact:
        key = self.plan.stage(stage).key
        assert key is not None
        artifact = self.store.get(stage, key)
        assert artifact is not None, f"{stage} is not in the store"
        return artifact

    def has(self, stage: str) -> bool:
        key = self.plan.stage(stage).key
        assert key is not None
        return self.store.get(stage, key) is not None

    def damage(self, stage: str) -> None:
        self.made(stage).file("inputs.json").write_text("{ }")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    for kind, toy in bench.toys.items():
        monkeypatch.setitem(STAGES, kind, toy)
    return bench


# --- a run and the next -----------------------------------------------------------------------


def test_every_stage_runs_once_and_in_order(bench: Bench) -> None:
    outcome = bench.run()
    assert bench.diary() == list(ALL)
    assert outcome.ran == list(ALL)
    for name, inputs in GRAPH.items():
        artifact = bench.made(name)
        keys = {role: bench.plan.stage(i).key for role, i in inputs.items()}
        assert artifact.json("inputs.json") == keys
        assert outcome.artifacts[name].path == artifact.path
        assert artifact.manifest.key_inputs == bench.plan.stage(name).key_inputs
        assert artifact.manifest.recipe == "r"
        assert artifact.manifest.versions == {"toy": "1"}
        assert artifact.manifest.notes == (f"note of {name}",)
        assert artifact.manifest.seconds["total"] >= artifact.manifest.seconds["tools"] == 0
    titles = [line for line in bench.lines if line.startswith("[")]
    assert titles == [f"[{number}/5] {name}" for number, name in enumerate(ALL, 1)]
    assert list(bench.store.leftovers()) == []


def test_a_second_run_does_nothing_and_says_nothing(bench: Bench) -> None:
    bench.run()
    bench.lines.clear()
    outcome = bench.run()
    assert bench.diary() == list(ALL)
    assert outcome.ran == []
    assert set(bench.states().values()) == {"hit"}
    assert bench.lines == []
    assert set(outcome.artifacts) == set(ALL)


def test_only_what_changed_runs(bench: Bench) -> None:
    bench.run()
    graph = {name: dict(inputs) for name, inputs in GRAPH.items()}
    graph["card"]["audit"] = "compress"  # another key for the card, and so for publish
    bench.plan = make_plan(graph)
    assert bench.run().ran == ["card", "publish"]
    assert bench.diary() == [*ALL, "card", "publish"]


def test_time_of_tools_is_told_from_our_own(bench: Bench) -> None:
    def tool(context: StageContext) -> None:
        context.runner.tool_seconds["tool"] = 100.0

    bench.toys["compress"].before = tool
    outcome = bench.run()
    assert bench.made("compress").manifest.seconds["tools"] == 100.0
    by_id = {stage.id: stage for stage in outcome.stages}
    assert by_id["compress"].own_seconds < 0.1 < 100  # nothing here takes that long
    assert by_id["card"].own_seconds == pytest.approx(by_id["card"].seconds)


def test_places(bench: Bench, tmp_path: Path) -> None:
    found = places(bench.run(), tmp_path)
    assert found == {
        "published (folder)": "/somewhere",
        "artifact": str(bench.made("compress").path / "model"),
        "card": str(bench.made("card").path / "README.md"),
        "record": str(bench.made("card").path / "record.json"),
        "logs": str(tmp_path / "logs"),
    }
    assert places(Outcome(), tmp_path) == {"logs": str(tmp_path / "logs")}


# --- selection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "first", "last", "expected"),
    [
        (None, None, None, ALL),
        ("card", None, None, ("card",)),
        (None, "compare", None, ("compare", "card", "publish")),
        (None, None, "compress", ("fetch", "compress")),
        (None, "compress", "card", ("compress", "compare", "card")),
        (None, "card", "card", ("card",)),
    ],
)
def test_select(
    only: str | None, first: str | None, last: str | None, expected: tuple[str, ...]
) -> None:
    assert select(make_plan(), only, first, last) == expected


@pytest.mark.parametrize(
    ("only", "first", "last", "message"),
    [
        ("measure", None, None, "--only measure: this recipe has no such stage"),
        (None, "x", None, "--from x"),
        (None, None, "x", "--until x"),
        ("card", "fetch", None, "--only excludes"),
        ("card", None, "card", "--only excludes"),
        (None, "card", "fetch", "--from card comes after --until fetch"),
    ],
)
def test_select_what_is_not_there(
    only: str | None, first: str | None, last: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        select(make_plan(), only, first, last)
    assert caught.value.hint


def test_stages_that_were_not_asked_for_do_not_run(bench: Bench) -> None:
    bench.run(("fetch", "compress"))
    assert bench.diary() == ["fetch", "compress"]
    assert bench.states() == {"fetch": "ran", "compress": "ran"}
    bench.run(("compare",))
    assert bench.diary() == ["fetch", "compress", "compare"]
    assert bench.states() == {"compare": "ran"}


def test_an_input_that_is_neither_asked_for_nor_there(bench: Bench) -> None:
    bench.run(("fetch",))
    with pytest.raises(UsageError, match="stage compress is needed and not in the store") as caught:
        bench.run(("compare", "card"))
    assert "run it first" in caught.value.hint
    assert bench.diary() == ["fetch"]


# --- damage and staleness ---------------------------------------------------------------------


def test_damage_is_repaired_and_the_damaged_kept_aside(bench: Bench) -> None:
    bench.run()
    good = bench.made("compress").json("inputs.json")
    bench.damage("compress")
    bench.lines.clear()
    outcome = bench.run()
    assert outcome.ran == ["compress"]  # its key is the same: what follows stands
    assert bench.made("compress").json("inputs.json") == good
    (reason,) = [stage.reason for stage in outcome.stages if stage.state == "ran"]
    assert reason.startswith("damaged in the store: inputs.json has 3 bytes")
    assert any(reason in line for line in bench.lines)
    (aside,) = bench.store.leftovers()
    assert (aside / "inputs.json").read_text() == "{ }"


def test_damage_where_nothing_is_to_run_is_said_and_left_alone(bench: Bench) -> None:
    bench.run()
    bench.damage("compress")
    with pytest.raises(UsageError, match=r"compress is needed .*damaged in the store"):
        bench.run(("publish",))
    assert bench.has("compress")
    assert list(bench.store.leftovers()) == []


def test_a_failed_repair_leaves_the_damage_to_be_seen(bench: Bench) -> None:
    bench.run()
    bench.damage("compress")

    def fail(context: StageContext) -> None:
        raise ZeroDivisionError

    bench.toys["compress"].before = fail
    with pytest.raises(ZeroDivisionError):
        bench.run()
    assert bench.store.damage(bench.made("compress"))
    bench.toys["compress"].before = lambda context: None
    assert bench.run().ran == ["compress"]


def test_a_stale_artifact_is_made_again(bench: Bench) -> None:
    bench.run()
    bench.toys["publish"].why = "out/ was changed: model.safetensors"
    outcome = bench.run()
    assert outcome.ran == ["publish"]
    assert outcome.stages[-1].reason == "out/ was changed: model.safetensors"
    assert bench.diary() == [*ALL, "publish"]


def test_a_failing_stage_leaves_the_earlier_ones(bench: Bench) -> None:
    def fail(context: StageContext) -> None:
        (context.work / "layer-3").write_text("done")
        (context.files / "half").write_text("half")
        raise ZeroDivisionError

    bench.toys["compare"].before = fail
    with pytest.raises(ZeroDivisionError):
        bench.run()
    assert bench.states() == {"fetch": "ran", "compress": "ran"}  # what the result file will say
    assert not bench.has("compare")
    seen: dict[str, object] = {}

    def resume(context: StageContext) -> None:
        seen["work"] = (context.work / "layer-3").read_text()
        seen["files"] = list(context.files.iterdir())

    bench.toys["compare"].before = resume
    assert bench.run().ran == ["compare", "card", "publish"]
    assert seen == {"work": "done", "files": []}


def test_a_full_disk_is_no_bug(bench: Bench) -> None:
    def fill_up(context: StageContext) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    bench.toys["compress"].before = fill_up
    with pytest.raises(
        ResourceError, match=r"stage compress: the disk is full.*'weights'"
    ) as caught:
        bench.run()
    assert "store gc" in caught.value.hint

    def missing(context: StageContext) -> None:
        raise FileNotFoundError("a bug")

    bench.toys["compress"].before = missing
    with pytest.raises(FileNotFoundError):
        bench.run()


# --- gates ------------------------------------------------------------------------------------


def test_a_failed_gate_stops_before_publishing_but_after_the_card(bench: Bench) -> None:
    bench.toys["compare"].value = 1.25
    for _ in range(2):  # and again when everything is there
        with pytest.raises(GateError, match=r"perplexity is ×1\.25, the limit is 1\.1"):
            bench.run()
        assert bench.diary() == ["fetch", "compress", "compare", "card"]
        assert "card" in bench.outcome.artifacts
    assert not bench.has("publish")


def test_a_failed_gate_fails_a_recipe_that_publishes_nothing(bench: Bench) -> None:
    bench.toys["compare"].value = 1.25
    bench.plan = make_plan({name: GRAPH[name] for name in ALL if name != "publish"})
    with pytest.raises(GateError):
        bench.run(("fetch", "compress", "compare", "card"))
    assert bench.has("card")


@pytest.mark.parametrize(
    ("selected", "fails"),
    [
        (("fetch",), False),
        (("fetch", "compress"), False),
        (("compare",), True),
        (("fetch", "compress", "compare"), True),
        (("card",), False),
        (("publish",), True),
        (("card", "publish"), True),
    ],
)
def test_gates_are_asked_where_they_matter(
    selected: tuple[str, ...], fails: bool, bench: Bench
) -> None:
    bench.toys["compare"].value = 1.25
    with pytest.raises(GateError):
        bench.run()
    if fails:
        with pytest.raises(GateError):
            bench.run(selected)
    else:
        bench.run(selected)
    assert not bench.has("publish")


def test_nothing_is_published_whose_gates_cannot_be_asked(bench: Bench) -> None:
    bench.toys["compare"].value = 1.25
    with pytest.raises(GateError):
        bench.run()
    bench.store.set_aside("compare", bench.made("compare").manifest.key)
    with pytest.raises(UsageError, match="stage compare is needed"):
        bench.run(("publish",))
    assert not bench.has("publish")


def test_a_recipe_that_measures_nothing_is_published(bench: Bench) -> None:
    bench.plan = make_plan(
        {
            "fetch": {},
            "compress": {"source": "fetch"},
            "card": {"compress": "compress"},
            "publish": {"compress": "compress", "card": "card"},
        }
    )
    assert bench.run(("fetch", "compress", "card", "publish")).ran[-1] == "publish"


# --- other processes --------------------------------------------------------------------------


def wait_for_a_word(context: StageContext) -> None:
    """Scratch work, then a wait for the test."""
    with (context.work / "rounds").open("a") as file:
        file.write("round\n")
    (context.files / "half").write_text("half")
    print("running", context.entry.id, flush=True)
    assert sys.stdin.readline(), "nobody spoke"


def child(folder: str, waits_in: str) -> None:
    """What a pipeline does in a process of its own; called by the helpers below."""
    bench = Bench(Path(folder))
    STAGES.update(bench.toys)
    if waits_in:
        bench.toys[waits_in].before = wait_for_a_word
    bench.lines = Printed()
    bench.run()
    print(json.dumps(bench.states()), flush=True)


class Printed(list[str]):
    def append(self, line: str) -> None:
        print(line.strip(), flush=True)


CHILD = "import sys, test_execute; test_execute.child(*sys.argv[1:])"
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")])}


def until(process: Any, start: str) -> str:
    """The next line that begins like this."""
    while not (line := str(process.read())).startswith(start):
        pass
    return line


@pytest.mark.parametrize("stage", ["fetch", "compress", "card"])
def test_killed_in_a_stage_the_next_run_goes_on_there(stage: str, bench: Bench) -> None:
    with helper(CHILD, bench.folder, stage, env=PATHS) as killed:
        assert until(killed, "running") == f"running {stage}"
        killed.kill()
    position = ALL.index(stage)
    assert bench.diary() == list(ALL[: position + 1])
    assert not bench.has(stage)
    rounds = {}

    def before(context: StageContext) -> None:
        rounds["work"] = (context.work / "rounds").read_text()
        rounds["files"] = str(list(context.files.iterdir()))

    bench.toys[stage].before = before
    outcome = bench.run()
    assert outcome.ran == list(ALL[position:])
    assert rounds == {"work": "round\n", "files": "[]"}
    # no trace of the half-made one in the result
    assert [entry.name for entry in bench.made(stage).manifest.files if entry.name == "half"] == []
    assert list(bench.store.leftovers()) == []


def test_runs_side_by_side_share_the_work(bench: Bench) -> None:
    with helper(CHILD, bench.folder, "compress", env=PATHS) as one:
        until(one, "running compress")
        with helper(CHILD, bench.folder, "", env=PATHS) as two:
            until(two, "another run is making this")
            one.say()
            said = [json.loads(until(run, "{")) for run in (one, two)]
    assert sorted(bench.diary()) == sorted(ALL)  # every stage once
    for name in ALL:
        assert sorted([said[0][name], said[1][name]]) == ["hit", "ran"]
    assert (said[0]["compress"], said[1]["compress"]) == ("ran", "hit")
    assert list(bench.store.leftovers()) == []
