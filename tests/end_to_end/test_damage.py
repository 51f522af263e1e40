"""What the gate is for: damaged checkpoints are found, an identical copy passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantize.session import Session
from quantize.store import Store
from tests.end_to_end import damage
from tests.end_to_end.conftest import ROOT, SHORT_SUITE, Work

pytestmark = pytest.mark.end_to_end

RECIPE = "tiny-llama-gptq"
MEASURED = (f"evaluate.suite={SHORT_SUITE}", "evaluate.noise=false", "model.base=null")


@dataclass(frozen=True)
class Judged:
    """What a run said of a candidate."""

    code: int
    err: str
    record: dict[str, Any]
    details: dict[str, Any]

    @property
    def compare(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["compare"]
        return found

    def verdict(self, name: str) -> str:
        found: str = next(v["verdict"] for v in self.compare["verdicts"] if v["name"] == name)
        return found


def judge(work: Work, *arguments: str) -> Judged:
    """Run the recipe up to the card; whatever the gate says, there is one."""
    options = [part for argument in (*MEASURED, *arguments) for part in ("--set", argument)]
    done = work.quantize(
        "run", RECIPE, "--store", str(work.store), "--json", "--until", "card", *options
    )
    assert done.code in (0, 7), done.err
    result = done.json()
    record = json.loads(Path(result["places"]["record"]).read_text())
    key = record["artifacts"]["compare"]
    details = json.loads((work.store / "compare" / key / "details.json").read_text())
    return Judged(done.code, done.err, record, details)


def plant(work: Work, change: str, harm: Callable[[Path], None]) -> None:
    """Put a harmed copy of the recipe's result where a run with `change` looks for its own.

    The audit's result is put there too: it would have found most of this before any server starts.
    """
    sound = Session.open(RECIPE, (), work.store, online=False)
    planned = Session.open(RECIPE, (change,), work.store, online=False)
    store = Store(work.store)
    for kind in ("compress", "audit"):
        source, entry = sound.plan.stage(kind), planned.plan.stage(kind)
        assert source.key is not None
        assert entry.key is not None
        assert entry.key != source.key
        made = store.get(kind, source.key)
        assert made is not None, f"the sound {kind} comes first"
        with store.staging(kind, entry.key) as staging:
            shutil.copytree(made.path, staging.files, dirs_exist_ok=True)
            (staging.files / "manifest.json").unlink()
            if kind == "compress":
                harm(staging.files / "model")
            store.commit(
                staging, key_inputs=entry.key_inputs, recipe=RECIPE, seconds={}, versions={}
            )


@pytest.fixture(scope="module")
def sound(work: Work) -> Judged:
    return judge(work)


def test_sound(sound: Judged) -> None:
    assert sound.code == 0, sound.err
    assert sound.verdict("perplexity") == "non-inferior"
    assert sound.verdict("model") in ("non-inferior", "inconclusive")


@pytest.mark.parametrize(
    ("number", "harm"),
    [
        pytest.param(1, damage.double_scales, id="scales"),
        pytest.param(2, damage.zero_head, id="head", marks=pytest.mark.slow),
    ],
)
def test_damaged_weights_are_inferior(
    number: int, harm: Callable[[Path], None], work: Work, sound: Judged
) -> None:
    change = f"quantize.dampening=0.0{number}1"
    plant(work, change, harm)
    found = judge(work, change)
    assert found.code == 7
    assert found.verdict("model") == found.verdict("perplexity") == "inferior"
    assert "perplexity" in found.err
    # where one looks in the report: the divergence is far above the sound one's, and answers flip
    kl = [judged.compare["divergence"]["mean"] for judged in (sound, found)]
    assert kl[1] > 3 * kl[0]
    assert found.compare["alarms"]
    flips = sum(map(len, found.details["flips"].values()))
    assert flips == sum(task["lost"] + task["gained"] for task in found.compare["tasks"])
    assert flips > sum(map(len, sound.details["flips"].values()))


def test_another_chat_template_is_no_comparison(work: Work, sound: Judged) -> None:
    change = "quantize.dampening=0.031"
    plant(work, change, damage.swap_template)
    found = judge(work, change)
    assert found.code == 7
    assert found.verdict("model") == found.verdict("task:valley_qa") == "not comparable"
    assert found.verdict("perplexity") == "non-inferior"  # the weights are sound
    assert "different prompts" in found.err
    assert "chat template" in found.err


def test_the_audit_finds_damage_before_any_server_starts(work: Work, sound: Judged) -> None:
    change = "quantize.dampening=0.041"
    plant(work, change, damage.double_scales)
    planned = Session.open(RECIPE, (change,), work.store, online=False).plan.stage("audit")
    assert planned.key is not None
    Store(work.store).set_aside("audit", planned.key)
    arguments = ("--store", str(work.store), "--until", "audit", "--set", change)
    done = work.quantize("run", RECIPE, *arguments)
    assert done.code == 1  # the tool made something else than it was asked for
    assert "model.layers.1.mlp.down_proj: row 0 is" in done.err


def test_an_identical_copy_has_no_flip(work: Work, sound: Judged) -> None:
    change = "quantize.dampening=0.051"
    plant(work, change, damage.original)
    found = judge(work, change)
    assert found.code == 0, found.err
    assert found.verdict("model") == "non-inferior"
    assert all(task["lost"] == task["gained"] == 0 for task in found.compare["tasks"])
    assert not any(found.details["flips"].values())
    assert abs(found.compare["perplexity"]["ratio"] - 1) < 1e-3
    assert found.compare["divergence"]["mean"] < sound.compare["divergence"]["mean"] / 10


def test_calibration_on_noise_is_inferior(work: Work, sound: Judged, tmp_path: Path) -> None:
    noise = tmp_path / "noise.jsonl"
    # The same letters as the real data's, in an order that says nothing.
    text = (ROOT / "examples/tiny_llama/calibration.jsonl").read_text()
    letters = sorted(set(text) - set('"\\{}\n'))
    state, rows = 1, []
    for _ in range(128):
        row = []
        for _ in range(400):
            state = state * 48271 % 2147483647
            row.append(letters[state % len(letters)])
        rows.append(json.dumps({"text": "".join(row)}))
    noise.write_text("\n".join(rows) + "\n")
    found = judge(work, f"calibration.source={noise}")
    assert found.code == 7
    assert found.verdict("model") == "inferior"
    assert any(finding["kind"] == "language" for finding in found.compare["lint"]["findings"])
