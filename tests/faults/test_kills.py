"""The kills' own parts: points are drawn evenly, and a broken promise would be noticed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from quantize.store import Store
from tests.faults.kills import checks
from tests.faults.kills.bench import Bench, Broken, Ended
from tests.faults.kills.points import count, draw

STAGES = {"fetch": ("fetch", "f0"), "compress": ("compress", "c0")}
LAYERS = [{"layer": 0, "seconds": 1.25}, {"layer": 1, "seconds": 1.5}]


def make(store: Store, stage: str, weights: bytes = b"weights", seconds: float = 1.0) -> None:
    kind, key = STAGES[stage]
    with store.staging(kind, key) as staging:
        (staging.files / "weights").write_bytes(weights)
        record = {"layers": LAYERS, "seconds": seconds, "method": "gptq"}
        (staging.files / "compress.json").write_text(json.dumps(record))
        store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, measured=False)
    bench.stages = dict(STAGES)
    for stage in STAGES:
        make(bench.clean, stage)
    make(bench.store, "fetch", seconds=2.0)
    return bench


def ended(code: int = 0, state: str = "ran", err: str = "") -> Ended:
    return Ended(code, json.dumps({"stages": [{"id": "compress", "state": state}]}), err)


def scratch(bench: Bench) -> Path:
    folder = bench.store.root / "compress" / ".staging" / "c0" / "work" / "stream"
    folder.mkdir(parents=True)
    return folder


def test_all_calls_have_their_turn() -> None:
    points = draw("compress", {"write": 1000, "rename": 3, "fsync": 40}, 30, seed=1)
    assert points == draw("compress", {"write": 1000, "rename": 3, "fsync": 40}, 30, seed=1)
    assert points != draw("compress", {"write": 1000, "rename": 3, "fsync": 40}, 30, seed=2)
    assert len(set(points)) == 30
    calls = Counter(point.call for point in points)
    assert calls["rename"] == 3
    assert abs(calls["write"] - calls["fsync"]) <= 1
    assert len(draw("fetch", {"rename": 2}, 30, seed=1)) == 2


def test_calls_are_counted_by_thread(tmp_path: Path) -> None:
    lines = ['7 write(3, ""..., 4) = 4', '8 write(1, ""..., 4 <unfinished ...>', "7 write(3)"]
    lines += ["8 <... write resumed>) = 4", "7 +++ killed by SIGKILL +++"]
    (tmp_path / "trace").write_text("\n".join(lines))
    assert count(tmp_path / "trace") == {"write": 2}


def test_a_sound_end_is_accepted(bench: Bench) -> None:
    left = checks.after_the_kill(bench, "compress", ended(-9))
    make(bench.store, "compress", seconds=9.0)
    checks.after_the_next_run(bench, "compress", left, ended())


def test_half_an_artifact_would_be_noticed(bench: Bench) -> None:
    make(bench.store, "compress")
    (bench.store.path("compress", "c0") / "weights").write_bytes(b"half")
    with pytest.raises(Broken, match="taken for complete"):
        checks.after_the_kill(bench, "compress", ended(-9))


def test_a_traceback_or_an_odd_end_would_be_noticed(bench: Bench) -> None:
    with pytest.raises(Broken, match="ended with 1"):
        checks.after_the_kill(bench, "compress", ended(1))
    with pytest.raises(Broken, match="traceback"):
        checks.after_the_kill(bench, "compress", ended(4, err="Traceback (most recent call last)"))


def test_a_lost_stage_would_be_noticed(bench: Bench) -> None:
    bench.store.set_aside("fetch", "f0")
    with pytest.raises(Broken, match="fetch is gone"):
        checks.after_the_kill(bench, "compress", ended(-9))


def test_a_stage_that_is_skipped_would_be_noticed(bench: Bench) -> None:
    left = checks.after_the_kill(bench, "compress", ended(-9))
    make(bench.store, "compress")
    with pytest.raises(Broken, match="says hit"):
        checks.after_the_next_run(bench, "compress", left, ended(state="hit"))


def test_other_weights_would_be_noticed(bench: Bench) -> None:
    left = checks.after_the_kill(bench, "compress", ended(-9))
    make(bench.store, "compress", weights=b"other")
    with pytest.raises(Broken, match=r"another manifest: \['weights'\]"):
        checks.after_the_next_run(bench, "compress", left, ended())


def test_two_lost_layers_would_be_noticed(bench: Bench) -> None:
    folder = scratch(bench)
    (folder / "journal.jsonl").write_text('{"belongs_to": {}}\n')
    event = {"kind": "progress", "done": 1.2}
    (folder.parent / "compress.events.jsonl").write_text(json.dumps(event) + "\n{torn")
    with pytest.raises(Broken, match="2 layers are lost"):
        checks.after_the_kill(bench, "compress", ended(-9))


def test_a_layer_that_is_made_again_would_be_noticed(bench: Bench) -> None:
    folder = scratch(bench)
    lines: list[dict[str, object]] = [{"belongs_to": {}}, {"part": "outside"}]
    lines += [{"part": "0", "layer": 0, "seconds": 7.5}]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = checks.after_the_kill(bench, "compress", ended(-9))
    make(bench.store, "compress")
    with pytest.raises(Broken, match=r"made again: \[0\]"):
        checks.after_the_next_run(bench, "compress", left, ended())


def test_scratch_that_stays_would_be_noticed(bench: Bench) -> None:
    left = checks.after_the_kill(bench, "compress", ended(-9))
    make(bench.store, "compress")
    scratch(bench)
    with pytest.raises(Broken, match="scratch is left"):
        checks.after_the_next_run(bench, "compress", left, ended())
