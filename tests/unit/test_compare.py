"""The compare stage on measure artifacts in a real store."""

import json
from dataclasses import replace

import numpy as np
import pytest
from records_fixture import (
    HELD_OUT,
    RECIPE,
    artifact,
    baseline_side,
    candidate_side,
    measure_artifact,
    new_store,
    resolved_recipe,
    stage_context,
)

from quantize.errors import SourceError
from quantize.evaluation import GateRules, Margins
from quantize.quantization import Quantize
from quantize.report.paired.comparing import compare
from quantize.report.paired.verdicts import Rules
from quantize.stages import compare as stage
from quantize.stages.compare import failed_gates

UNSERVED = [{"what": "everything through the server", "why": "no FP8 kernels on a CPU"}]


def compared(tmp_path, before, after, margins=None, gate=None, **others):
    """Record and details; `others` are more sides, by the argument's name."""
    store = new_store(tmp_path)
    sides = measure_artifact(store, "b", before), measure_artifact(store, "c", after)
    more = {name: measure_artifact(store, name, side) for name, side in others.items()}
    return compare(*sides, Rules(margins or Margins(), gate or GateRules(), 4), **more)


def large(side, documents=1000):
    """Tasks that are large enough for a verdict."""
    side.scores = {"valley_mc": [1, 1, 1, 0] * (documents // 4), "valley_qa": [1, 0] * 500}
    return side


def verdicts(record):
    return {verdict["name"]: verdict["verdict"] for verdict in record["verdicts"]}


def test_a_candidate_that_moved_a_little(tmp_path):
    record, details = compared(tmp_path, baseline_side(), candidate_side())
    assert record["schema"] == "quantize.compare/2"
    assert record["size_ratio"] == pytest.approx(432_109 / 1_234_567)
    perplexity = record["perplexity"]
    assert perplexity["ratio"] == pytest.approx(perplexity["candidate"] / perplexity["baseline"])
    assert 0 < record["divergence"]["mean"] < 0.1
    flips = {task["name"]: (task["lost"], task["gained"]) for task in record["tasks"]}
    assert flips == {"valley_mc": (1, 0), "valley_qa": (0, 6)}
    assert [flip["doc"] for flip in details["flips"]["valley_mc"]] == ["1"]
    assert record["not_measured"] == []
    assert sum(details["delta_log_p"]["perplexity"]["counts"]) == perplexity["scored_tokens"]
    assert sum(details["series"]["perplexity"]["tokens"]) == perplexity["scored_tokens"]
    count = next(smoke for smoke in record["smoke"] if smoke["name"] == "count")
    assert not count["identical"]
    assert count["similarity"] == pytest.approx(2 / 3)  # two of three words on each side
    assert "matches_baseline" not in count


def test_an_identical_copy_is_non_inferior_with_zero_flips(tmp_path):
    record, details = compared(tmp_path, large(baseline_side()), large(baseline_side()))
    assert set(verdicts(record).values()) == {"non-inferior"}
    assert list(verdicts(record)) == [
        "perplexity",
        "task:valley_mc",
        "task:valley_qa",
        "tasks",
        "model",
    ]
    assert failed_gates(record) == []
    assert record["perplexity"]["ratio"] == record["perplexity"]["ratio_high"] == 1
    assert record["divergence"]["maximum"] == record["divergence"]["mean_high"] == 0
    assert all(
        task["difference"] == task["lost"] == task["gained"] == 0 for task in record["tasks"]
    )
    assert details["flips"] == {"valley_mc": [], "valley_qa": []}
    assert record["aggregate"]["pooled_p"] == 1
    assert record["alarms"] == []
    assert all(smoke["identical"] for smoke in record["smoke"])


def test_a_damaged_candidate_is_inferior_and_every_sentence_says_why(tmp_path):
    after = large(candidate_side(noise=2.0))
    after.scores["valley_mc"] = [1, 1, 0, 0] * 250
    record, _ = compared(tmp_path, large(baseline_side()), after)
    found = verdicts(record)
    assert (found["perplexity"], found["task:valley_mc"], found["model"]) == ("inferior",) * 3
    assert found["task:valley_qa"] == "non-inferior"
    failed = failed_gates(record)
    assert [sentence.split(" is ")[0] for sentence in failed] == [
        "perplexity",
        "task valley_mc",
        "the tasks' average",
    ]
    assert "0.25 worse" in failed[1]
    assert "recovery 0.97 of 0.75" in failed[1]
    assert "mean KL divergence is " in record["alarms"][0]
    assert "the most likely token is the same at " in record["alarms"][1]


def test_too_small_a_suite_is_inconclusive_and_says_how_many_more(tmp_path):
    sides = baseline_side(), candidate_side()
    record, _ = compared(tmp_path, *sides)
    found = {verdict["name"]: verdict for verdict in record["verdicts"]}
    assert found["task:valley_mc"]["verdict"] == "inconclusive"
    assert found["task:valley_mc"]["more_documents"] > 40
    worse = replace(sides[1], scores={"valley_mc": sides[1].scores["valley_mc"]})
    (tmp_path / "two").mkdir()
    record, _ = compared(tmp_path / "two", sides[0], worse)
    assert verdicts(record)["model"] == "inconclusive"
    (sentence,) = failed_gates(record)
    assert "more documents would decide" in sentence
    (tmp_path / "three").mkdir()
    lenient, _ = compared(tmp_path / "three", sides[0], worse, gate=GateRules(inconclusive="pass"))
    assert failed_gates(lenient) == []


def test_only_the_tasks_that_the_recipe_asks_for_count(tmp_path):
    after = large(baseline_side())
    after.scores["valley_mc"] = [0] * 1000
    gate = GateRules(tasks=("valley_qa",))
    record, _ = compared(tmp_path, large(baseline_side()), after, gate=gate)
    found = {verdict["name"]: verdict for verdict in record["verdicts"]}
    assert found["task:valley_mc"]["verdict"] == "inferior"
    assert not found["task:valley_mc"]["counts"]
    assert found["model"]["verdict"] == "non-inferior"
    assert record["aggregate"]["tasks"] == 1
    assert failed_gates(record) == []


def test_no_margin_no_verdict(tmp_path):
    margins = Margins(perplexity_ratio="none", tasks={"valley_mc": {"recovery": "none"}})
    record, _ = compared(tmp_path, large(baseline_side()), large(baseline_side()), margins)
    assert list(verdicts(record)) == ["task:valley_qa", "tasks", "model"]
    assert record["aggregate"]["tasks"] == 2


def test_a_task_that_the_baseline_fails_altogether_has_no_recovery(tmp_path):
    sides = [large(baseline_side()) for _ in range(2)]
    for side in sides:
        side.scores["valley_qa"] = [0] * 1000
    record, _ = compared(tmp_path, *sides)
    assert "task:valley_qa" not in verdicts(record)
    assert verdicts(record)["model"] == "non-inferior"
    assert record["not_measured"] == [
        {
            "what": "verdict on task valley_qa",
            "why": "the baseline scores 0: there is nothing to recover",
        }
    ]


def test_a_candidate_that_was_not_served_keeps_its_reason(tmp_path):
    after = candidate_side()
    after.served, after.not_measured = False, UNSERVED
    margins = Margins(perplexity_ratio=1.05, task_drop=0.02, tasks={"valley_qa": {"drop": 0.1}})
    record, details = compared(tmp_path, baseline_side(), after, margins)
    assert "perplexity" not in record
    assert "divergence" not in record
    assert "aggregate" not in record
    assert (record["tasks"], record["smoke"], record["gates"]) == ([], [], [])
    assert details == {"series": {}, "delta_log_p": {}, "flips": {}}
    (model,) = record["verdicts"]
    assert (model["verdict"], model["counts"]) == ("inconclusive", False)
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
        "margin of task valley_qa",
    ]


def test_what_both_sides_miss_is_said_once(tmp_path):
    before, after = baseline_side(), candidate_side()
    before.not_measured = after.not_measured = [{"what": "KV-cache size", "why": "not reported"}]
    record, _ = compared(tmp_path, before, after)
    assert record["not_measured"] == [{"what": "KV-cache size", "why": "not reported"}]


# --- what cannot be compared


def test_other_prompts_are_not_comparable_and_the_rest_still_is(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    after.asked = "Answer: "
    record, _ = compared(tmp_path, before, after)
    assert verdicts(record) == {
        "perplexity": "non-inferior",
        "task:valley_mc": "not comparable",
        "task:valley_qa": "not comparable",
        "model": "not comparable",
    }
    assert record["tasks"] == []
    first, _ = failed_gates(record)
    assert "were asked different prompts for document 0" in first
    assert "chat template" in first


def test_missing_documents_are_not_comparable(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    after.scores = {**after.scores, "valley_mc": after.scores["valley_mc"][:-1]}
    record, _ = compared(tmp_path, before, after)
    found = verdicts(record)
    assert (found["task:valley_mc"], found["task:valley_qa"], found["model"]) == (
        "not comparable",
        "non-inferior",
        "not comparable",
    )
    assert "candidate has no answer to document 999" in failed_gates(record)[0]
    assert [entry["what"] for entry in record["not_measured"]] == ["change of task valley_mc"]


@pytest.mark.parametrize(("scores", "count"), [([1], "1 document"), ([], "0 documents")])
def test_a_task_of_one_document_or_none_is_not_comparable(tmp_path, scores, count):
    before, after = large(baseline_side()), large(baseline_side())
    before.scores = {"valley_mc": scores}
    after.scores = {"valley_mc": scores}
    record, _ = compared(tmp_path, before, after)
    assert record["tasks"] == []
    assert "aggregate" not in record
    assert verdicts(record)["task:valley_mc"] == "not comparable"
    why = f"task valley_mc has {count}: no interval exists"
    assert record["not_measured"] == [{"what": "change of task valley_mc", "why": why}]


def test_a_score_that_is_no_number_is_not_comparable(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    after.scores["valley_qa"] = [float("nan"), *after.scores["valley_qa"][1:]]
    record, _ = compared(tmp_path, before, after)
    assert verdicts(record)["task:valley_qa"] == "not comparable"
    assert "score of document 0 is not a finite number" in failed_gates(record)[0]


def test_other_token_ids_are_not_comparable(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    store = new_store(tmp_path)
    first = measure_artifact(store, "b", before)
    second = measure_artifact(store, "c", after)
    record = second.json("record.json")
    record["perplexity"]["tokens_sha256"] = "f" * 64
    (second.path / "record.json").write_text(json.dumps(record))
    found, details = compare(first, second, Rules(Margins(), GateRules(), 4))
    assert verdicts(found)["perplexity"] == "not comparable"
    assert verdicts(found)["task:valley_mc"] == "non-inferior"
    assert "tokens_sha256 is " in failed_gates(found)[0]
    assert "perplexity" not in found
    assert details["series"] == {}


def test_log_probabilities_that_are_no_numbers_are_one_clear_error(tmp_path):
    store = new_store(tmp_path)
    before = measure_artifact(store, "b", baseline_side())
    after = measure_artifact(store, "c", candidate_side())
    path = after.file("token_logprobs.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["logprob"][7] = np.nan
    np.savez(path, **arrays)
    with pytest.raises(
        SourceError, match=r"c/token_logprobs\.npz: the server gave scored token 7"
    ) as e:
        compare(before, after, Rules(Margins(), GateRules(), 4))
    assert "NaN" in e.value.hint


def test_samples_that_are_not_there_are_one_clear_error(tmp_path):
    store = new_store(tmp_path)
    before = measure_artifact(store, "b", baseline_side())
    record = before.json("record.json")
    after = artifact(store, "measure", "c", {"record.json": {**record, "smoke": []}})
    with pytest.raises(SourceError, match="has no file token_logprobs"):
        compare(before, after, Rules(Margins(), GateRules(), 4))


# --- what stands beside the verdicts


def test_differences_no_larger_than_the_baseline_s_own_are_named(tmp_path):
    before, after, repeat = (large(baseline_side()) for _ in range(3))
    for side, changed in ((after, 2), (repeat, 4)):
        side.scores["valley_mc"] = [0] * changed + side.scores["valley_mc"][changed:]
    after.scores["valley_qa"] = [0, *after.scores["valley_qa"][1:]]
    repeat.logits = repeat.logits + 0.01
    repeat.logits[:, 0] += 0.001
    record, _ = compared(tmp_path, before, after, repeat=repeat)
    inside = {task["name"]: task["inside_noise"] for task in record["tasks"]}
    assert inside == {"valley_mc": True, "valley_qa": False}
    assert record["perplexity"]["inside_noise"]
    noise = record["noise"]
    assert [(task["name"], task["flips"]) for task in noise["tasks"]] == [
        ("valley_mc", 3),
        ("valley_qa", 0),
    ]
    assert noise["tokens_changed"] > 0.5


def test_without_a_repeat_nothing_is_said_of_noise(tmp_path):
    record, _ = compared(tmp_path, baseline_side(), candidate_side())
    assert "noise" not in record
    assert "inside_noise" not in record["perplexity"]


def test_retention_is_against_the_base(tmp_path):
    before, after, base = (large(baseline_side()) for _ in range(3))
    base.scores = {"valley_mc": [0, 0, 1, 0] * 250, "valley_qa": [1, 0] * 499 + [1, 1]}
    after.scores["valley_mc"] = [1, 1, 1, 0] * 225 + [0, 0, 1, 0] * 25
    record, _ = compared(tmp_path, before, after, base=base)
    first, second = record["retention"]
    assert first["retained"] == pytest.approx(0.9)
    assert first["retained_low"] < 0.9 < first["retained_high"]
    assert "retained" not in second
    base.asked = "Q: "
    (tmp_path / "two").mkdir()
    record, _ = compared(tmp_path / "two", before, after, base=base)
    assert record["retention"] == []
    why = {entry["what"]: entry["why"] for entry in record["not_measured"]}
    assert "different prompts" in why["retention of task valley_mc"]


def test_companions_that_were_not_served_say_so(tmp_path):
    sides = [large(baseline_side()) for _ in range(2)]
    unserved = replace(baseline_side(), served=False)
    record, _ = compared(tmp_path, *sides, repeat=unserved, base=unserved)
    assert "noise" not in record
    assert record["retention"] == []
    assert [entry["what"] for entry in record["not_measured"]] == [
        "noise of task valley_mc",
        "noise of task valley_qa",
        "retention of task valley_mc",
        "retention of task valley_qa",
    ]
    assert verdicts(record)["model"] == "non-inferior"


def health(faults):
    return [
        {
            "name": f"p{place}",
            "prompt": "Tell me.",
            "answer": "A long answer.",
            "finish_reason": "stop",
            "tokens": 40,
            "repeats": "again and" if fault else "",
            "replacement_characters": 0,
            "echoed": [],
            **({"schema_error": "no JSON" if fault else ""} if place < 10 else {}),
        }
        for place, fault in enumerate(faults)
    ]


def test_generation_health_that_got_worse_raises_an_alarm(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    before.health, after.health = health([0] * 39 + [1]), health([1] * 8 + [0] * 32)
    record, _ = compared(tmp_path, before, after)
    rates = {rate["name"]: rate for rate in record["health"]}
    repeating = rates["repeating"]
    assert (repeating["baseline"], repeating["candidate"]) == (1 / 40, 8 / 40)
    assert (repeating["got_worse"], repeating["got_better"]) == (8, 1)
    assert repeating["mcnemar_p"] == pytest.approx(2 * 10 / 512)
    assert repeating["alarm"]
    assert not rates["cut_off"]["alarm"]
    assert rates["cut_off"]["mcnemar_p"] == 1
    schema = rates["schema_valid"]
    assert (schema["baseline"], schema["got_worse"]) == (1, 8)
    assert schema["candidate"] == pytest.approx(0.2)
    assert [alarm.split(" went")[0] for alarm in record["alarms"]] == [
        "generation health: repeating",
        "generation health: schema_valid",
    ]
    assert failed_gates(record) == []


def test_a_quick_run_says_what_it_cannot_see(tmp_path):
    before, after = baseline_side(), baseline_side()
    before.quick = after.quick = True
    record, _ = compared(tmp_path, before, after)
    assert record["quick"]
    assert "this subset of 40 documents of valley_mc cannot see a loss below" in record["alarms"][0]


def test_the_own_text_has_a_verdict_of_its_own(tmp_path):
    before, after = large(baseline_side()), large(candidate_side(noise=2.0))
    before.own_text = after.own_text = True
    after.scores = before.scores
    record, details = compared(tmp_path, before, after)
    assert verdicts(record)["own_perplexity"] == "inferior"
    assert record["own_divergence"] == record["divergence"]
    assert set(details["series"]) == set(details["delta_log_p"]) == {"perplexity", "own_perplexity"}
    assert any("on the own text" in alarm for alarm in record["alarms"])


# --- smoke


def test_an_empty_answer_fails_and_a_different_one_does_not(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    after.answers = {"capital": " \n", "count": "Something else."}
    after.failing = frozenset({"capital"})
    record, _ = compared(tmp_path, before, after)
    assert record["smoke_failed"] == ["capital: not empty"]
    (sentence,) = failed_gates(record)
    assert sentence.startswith("1 of 2 smoke prompts that the baseline answers stay without")
    assert ": capital;" in sentence


@pytest.mark.parametrize(("demand", "failed"), [(0.6, []), (0.7, ["count"])])
def test_an_answer_less_similar_than_its_prompt_demands(tmp_path, demand, failed):
    before, after = baseline_side(), candidate_side()
    before.min_similarity = after.min_similarity = {"count": demand}
    record, _ = compared(tmp_path, before, after)
    assert record["smoke_failed"] == [
        f"{name}: similar to the baseline's answer" for name in failed
    ]
    count = next(smoke for smoke in record["smoke"] if smoke["name"] == "count")
    assert count["matches_baseline"] is not bool(failed)


def test_an_answer_that_the_baseline_did_not_give_either(tmp_path):
    before, after = large(baseline_side()), large(baseline_side())
    before.answers = {"capital": ""}
    after.answers = {"capital": ""}
    record, _ = compared(tmp_path, before, after)
    assert failed_gates(record) == []


# --- the stage


@pytest.mark.parametrize(
    ("method", "more", "bits"),
    [
        ("awq", {}, 4),
        ("int8", {}, 8),
        ("fp8", {}, 8),
        ("rtn", {"scheme": "W8A16"}, 8),
        ("rtn", {"scheme": "MXFP4A16"}, 4),
        ("fp8", {"overrides": ({"modules": ("lm_head",), "scheme": "NVFP4A16"},)}, 4),
    ],
)
def test_four_bits_anywhere_are_four_bits(method, more, bits):
    assert Quantize(method=method, **more).weight_bits == bits


def test_the_key_holds_margins_gate_and_bits(tmp_path):
    resolved = resolved_recipe(tmp_path)
    found = stage.key_inputs(resolved, "compare")
    assert found["bits"] == 4
    assert found["margins"]["task_drop"] == 0.03
    assert found["gate"]["inconclusive"] == "pass"
    assert stage.environments(resolved, "compare") == ()
    eight = {**RECIPE, "quantize": {"method": "int8"}}
    assert stage.key_inputs(resolved_recipe(tmp_path, eight), "compare") != found


def test_the_stage_writes_the_record_and_what_the_report_shows(tmp_path):
    store = new_store(tmp_path)
    rows = [{"row": n, "text": f"Row {n} of the calibration data.", "tokens": 9} for n in (3, 8)]
    rows[1]["text"] = HELD_OUT
    statistics = {"sequences": 2, "sequence_length": 64, "tokens": 18, "rows_used": 2}
    statistics |= {"packing": False, "chat_template_applied": False, "rows": 9}
    statistics |= {"rows_by_kind": {"text": 2}}
    inputs = {
        "baseline": measure_artifact(store, "b", baseline_side()),
        "candidate": measure_artifact(store, "c", candidate_side()),
        "repeat": measure_artifact(store, "r", baseline_side()),
        "base": measure_artifact(store, "x", candidate_side(5)),
        "calibrate": artifact(
            store,
            "calibrate",
            "l",
            {
                "calibrate.json": statistics,
                "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            },
        ),
    }
    context = stage_context(tmp_path, store, "compare", inputs)
    stage.run(context)
    record = json.loads((context.files / "record.json").read_text())
    details = json.loads((context.files / "details.json").read_text())
    assert record["schema"] == "quantize.compare/2"
    assert [gate["name"] for gate in record["gates"]] == [
        "perplexity",
        "task:valley_mc",
        "task:valley_qa",
        "tasks",
        "smoke_unanswered",
    ]
    assert record["verdicts"][-1]["name"] == "model"
    assert record["lint"]["rows"] == 2
    (overlap,) = [f for f in record["lint"]["findings"] if f["kind"] == "overlap"]
    assert overlap["rows"] == [8]
    assert "held-out text" in overlap["message"]
    assert {"noise", "aggregate"} <= set(record)
    assert len(record["retention"]) == 2
    assert set(details) == {"series", "delta_log_p", "flips"}
