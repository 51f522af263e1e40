"""The compare stage on measure artifacts in a real store."""

import json

import pytest
from records_fixture import (
    baseline_side,
    candidate_side,
    measure_artifact,
    new_store,
    stage_context,
)

from quantize.errors import SourceError
from quantize.recipe import Margins
from quantize.stages import compare as stage
from quantize.stages.compare import compare, failed_gates

UNSERVED = [{"what": "everything through the server", "why": "no FP8 kernels on a CPU"}]


def compared(tmp_path, before, after, margins=None):
    store = new_store(tmp_path)
    sides = measure_artifact(store, "b", before), measure_artifact(store, "c", after)
    return compare(*sides, margins or Margins())


def test_a_candidate_that_moved_a_little(tmp_path):
    record = compared(tmp_path, baseline_side(), candidate_side())
    assert record["size_ratio"] == pytest.approx(432_109 / 1_234_567)
    perplexity = record["perplexity"]
    assert perplexity["ratio"] == pytest.approx(perplexity["candidate"] / perplexity["baseline"])
    assert 0 < record["divergence"]["mean"] < 0.1
    flips = {task["name"]: (task["lost"], task["gained"]) for task in record["tasks"]}
    assert flips == {"valley_mc": (1, 0), "valley_qa": (0, 6)}
    assert record["not_measured"] == []
    count = next(smoke for smoke in record["smoke"] if smoke["name"] == "count")
    assert not count["identical"]
    assert count["similarity"] == pytest.approx(2 / 3)  # two of three words on each side
    assert "matches_baseline" not in count


def test_the_same_model_twice(tmp_path):
    record = compared(tmp_path, baseline_side(), baseline_side())
    assert record["perplexity"]["ratio"] == record["perplexity"]["ratio_high"] == 1
    assert record["divergence"]["maximum"] == 0
    assert all(
        task["difference"] == task["lost"] == task["gained"] == 0 for task in record["tasks"]
    )
    assert all(smoke["identical"] for smoke in record["smoke"])


def test_a_candidate_that_was_not_served_keeps_its_reason(tmp_path):
    after = candidate_side()
    after.served, after.not_measured = False, UNSERVED
    margins = Margins(perplexity_ratio=1.05, task_drop=0.02)
    record = compared(tmp_path, baseline_side(), after, margins)
    assert "perplexity" not in record
    assert "divergence" not in record
    assert (record["tasks"], record["smoke"], record["gates"]) == ([], [], [])
    assert record["not_measured"][0] == {
        "what": "everything through the server (candidate)",
        "why": "no FP8 kernels on a CPU",
    }
    missing = [entry["what"] for entry in record["not_measured"]]
    assert missing[1:] == [
        "change of perplexity",
        "change of task valley_mc",
        "change of task valley_qa",
        "margin perplexity_ratio",
        "margin task_drop",
    ]


def test_what_both_sides_miss_is_said_once(tmp_path):
    before, after = baseline_side(), candidate_side()
    before.not_measured = after.not_measured = [{"what": "KV-cache size", "why": "not reported"}]
    record = compared(tmp_path, before, after)
    assert record["not_measured"] == [{"what": "KV-cache size", "why": "not reported"}]


def test_failed_gates_are_recorded_and_named(tmp_path):
    after = candidate_side(noise=2.0)
    margins = Margins(perplexity_ratio=1.01, task_drop=0.01)
    record = compared(tmp_path, baseline_side(), after, margins)
    passed = {gate["name"]: gate["passed"] for gate in record["gates"]}
    assert passed == {
        "perplexity_ratio": False,
        "task_drop:valley_mc": False,
        "task_drop:valley_qa": True,
        "smoke_unanswered": True,
    }
    first, second = failed_gates(record)
    assert first.startswith("perplexity_ratio is ")
    assert second == "task_drop:valley_mc is 0.025, the limit is 0.01"


def test_an_empty_answer_fails_and_a_different_one_does_not(tmp_path):
    after = candidate_side()
    after.answers = {"capital": " \n", "count": "Something else."}
    after.failing = frozenset({"capital"})
    record = compared(tmp_path, baseline_side(), after)
    assert record["smoke_failed"] == ["capital: not empty"]
    assert failed_gates(record) == ["smoke_unanswered is 1, the limit is 0"]


@pytest.mark.parametrize(("demand", "failed"), [(0.6, []), (0.7, ["count"])])
def test_an_answer_less_similar_than_its_prompt_demands(tmp_path, demand, failed):
    before, after = baseline_side(), candidate_side()
    before.min_similarity = after.min_similarity = {"count": demand}
    record = compared(tmp_path, before, after)
    assert record["smoke_failed"] == [
        f"{name}: similar to the baseline's answer" for name in failed
    ]
    count = next(smoke for smoke in record["smoke"] if smoke["name"] == "count")
    assert count["matches_baseline"] is not bool(failed)


def test_an_answer_that_the_baseline_did_not_give_either(tmp_path):
    before, after = baseline_side(), candidate_side()
    before.answers = {"capital": ""}
    after.answers = {"capital": ""}
    assert failed_gates(compared(tmp_path, before, after)) == []


def test_a_task_with_one_document_is_not_compared(tmp_path):
    before, after = baseline_side(), candidate_side()
    before.scores = {"valley_mc": [1]}
    after.scores = {"valley_mc": [0]}
    record = compared(tmp_path, before, after)
    assert record["tasks"] == []
    assert record["not_measured"] == [
        {"what": "change of task valley_mc", "why": "one document has no interval"}
    ]


def test_other_prompts_stop_the_comparison(tmp_path):
    before, after = baseline_side(), candidate_side()
    after.scores = {**after.scores, "valley_mc": after.scores["valley_mc"][:-1]}
    with pytest.raises(SourceError, match="candidate has no answer to document 39"):
        compared(tmp_path, before, after)


def test_the_stage_writes_the_record(tmp_path):
    store = new_store(tmp_path)
    inputs = {
        "baseline": measure_artifact(store, "b", baseline_side()),
        "candidate": measure_artifact(store, "c", candidate_side()),
    }
    context = stage_context(tmp_path, store, "compare", inputs)
    stage.run(context)
    record = json.loads((context.files / "record.json").read_text())
    assert record["schema"] == "quantize.compare/1"
    assert [gate["name"] for gate in record["gates"]] == [
        "perplexity_ratio",
        "task_drop:valley_mc",
        "task_drop:valley_qa",
        "smoke_unanswered",
    ]
    assert stage.key_inputs(context.resolved, "compare") == {
        "margins": {"perplexity_ratio": 1.05, "task_drop": 0.03}
    }
    assert stage.environments(context.resolved, "compare") == ()
