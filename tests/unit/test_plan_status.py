"""What the plan says of each stage, from what the store holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.plan import Plan, StageEntry
from quantize.planner import STAGES, plan, with_stale, with_status
from quantize.stages.base import Resolved
from quantize.store import Artifact, Store
from tests.unit.planning import ALL, Tiny, keys, locks


def fill(store: Store, made: Plan, *stage_ids: str) -> None:
    """Commit stages of a plan as an execution would."""
    for entry in made.stages:
        if entry.id in stage_ids:
            assert entry.key is not None
            with store.staging(entry.kind, entry.key) as staging:
                store.commit(
                    staging,
                    key_inputs=entry.key_inputs,
                    recipe=made.recipe_name,
                    seconds={},
                    versions={},
                )


def said(made: Plan, store: Store) -> dict[str, tuple[str, str]]:
    return {entry.id: (entry.status, entry.reason) for entry in with_status(made, store).stages}


def test_status_of_a_fresh_store(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert set(said(plan(tiny(), locks), store).values()) == {("missing", "not made yet")}
    assert not store.root.exists()  # planning writes nothing


def test_status_says_what_is_done(tiny: Tiny, tmp_path: Path) -> None:
    store, made = Store(tmp_path), plan(tiny(), locks)
    fill(store, made, "fetch", "compress", "measure-baseline")
    status = said(made, store)
    done = {name for name, value in status.items() if value == ("done", "in the store")}
    assert done == {"fetch", "compress", "measure-baseline"}
    # of the same kind and recipe as the baseline's, but nothing earlier of its own
    assert status["measure-candidate"] == ("missing", "not made yet")


def test_status_says_what_changed(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, plan(tiny(), locks), *ALL)
    status = said(plan(tiny("quantize.scheme=W4A16"), locks), store)
    assert [name for name in ALL if status[name][0] == "done"] == [
        "fetch", "calibrate", "measure-baseline", "measure-repeat", "fetch-base", "measure-base"
    ]  # fmt: skip
    assert status["compress"] == ("changed", 'scheme: "W4A16_ASYM" → "W4A16"')
    old, new = (keys(plan(tiny(*x), locks))["compress"] for x in ((), ["quantize.scheme=W4A16"]))
    assert old is not None
    assert new is not None
    assert status["measure-candidate"] == (
        "changed",
        f"inputs.model: {old[:12]} → {new[:12]}",
    )


def test_the_nearest_earlier_result_is_compared(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, plan(tiny("calibration.seed=7", "calibration.samples=9"), locks), "calibrate")
    fill(store, plan(tiny("calibration.seed=8"), locks), "calibrate")
    assert said(plan(tiny(), locks), store)["calibrate"] == ("changed", "seed: 8 → 0")


def test_many_changes_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = ("samples=1", "sequence_length=2", "packing=true", "seed=3", "split=x")
    fill(store, plan(tiny(*(f"calibration.{name}" for name in names)), locks), "calibrate")
    status, reason = said(plan(tiny(), locks), store)["calibrate"]
    assert status == "changed"
    assert reason == "packing: true → false; samples: 1 → 128; seed: 3 → 0; and 2 more"


@pytest.mark.parametrize("change", ["code", "lock"])
def test_status_names_code_and_locks(
    change: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    fill(store, plan(tiny(), locks), "calibrate")
    if change == "code":
        version = STAGES["calibrate"].VERSION
        monkeypatch.setattr(STAGES["calibrate"], "VERSION", version + 1)
        assert (
            said(plan(tiny(), locks), store)["calibrate"][1] == f"code: {version} → {version + 1}"
        )
    else:
        reason = said(plan(tiny(), lambda name: "new"), store)["calibrate"][1]
        assert reason == 'locks.llmcompressor: "lock of llmcompressor" → "new"'


def test_what_a_hook_calls_stale_is_changed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, resolved = Store(tmp_path), tiny()
    made = plan(resolved, locks)
    asked = []

    def stale(given: Resolved, entry_id: str, artifact: Artifact) -> str:
        assert entry_id == "publish"
        asked.append(artifact.manifest.key)
        return "somebody changed it"

    monkeypatch.setattr(STAGES["publish"], "stale", stale)
    monkeypatch.delattr(STAGES["fetch"], "stale")

    def publish() -> StageEntry:
        return with_stale(with_status(made, store), store, resolved).stage("publish")

    assert publish().status == "missing"  # and no hook is asked of what is not there
    fill(store, made, "fetch", "publish")
    assert (publish().status, publish().reason) == ("changed", "somebody changed it")
    assert set(asked) == {keys(made)["publish"]}
    (store.path("publish", asked[0]) / "extra").write_text("")  # no hook reads a damaged artifact
    asked.clear()
    assert (publish().status, publish().reason) == (
        "changed",
        "damaged in the store: extra was added",
    )
    assert asked == []


def test_another_recipe_is_no_earlier_result(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, plan(tiny("name=other", "calibration.seed=5"), locks), "calibrate")
    assert said(plan(tiny(), locks), store)["calibrate"] == ("missing", "not made yet")
    fill(store, plan(tiny("name=other"), locks), "calibrate")  # the same contents are a hit
    assert said(plan(tiny(), locks), store)["calibrate"] == ("done", "in the store")
