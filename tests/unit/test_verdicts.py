"""Verdicts and gates: rules, Holm, and how often they are wrong."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from quantize.evaluation import GateRules, Margins
from quantize.report.paired.aggregate import average
from quantize.report.paired.gates import gates
from quantize.report.paired.intervals import Student, paired_mean
from quantize.report.paired.verdicts import (
    Question,
    Rules,
    holm,
    judge,
    model_verdict,
    more_documents,
)

ERROR = 0.01


def estimate(value, error=ERROR):
    return Student(value, value, error, np.inf)


def question(name, value, *, margin=0.03, error=ERROR, counts=True):
    return Question(name, "drop 0.03", counts, estimate(value, error), margin, 400)


def rules(bits=4, gate=None, **margins):
    return Rules(Margins(**margins), gate or GateRules(), bits)


def delta(name="t", baseline=0.8, higher_is_better=True):
    return {"name": name, "baseline": baseline, "higher_is_better": higher_is_better}


# --- margins


@pytest.mark.parametrize(("bits", "recovery", "ratio"), [(4, 0.97, 1.05), (8, 0.99, 1.01)])
def test_default_margins_go_by_the_bits(bits, recovery, ratio):
    found = rules(bits)
    assert found.perplexity_ratio == ratio
    assert found.task_rule("t") == ("recovery", recovery)
    assert found.task_margin(delta()) == pytest.approx((1 - recovery) * 0.8)


def test_margins_of_the_recipe_and_of_single_tasks():
    found = rules(
        task_drop=0.02,
        tasks={"a": {"recovery": 0.9}, "b": {"recovery": "none"}, "c": {"drop": 0.1}},
    )
    assert [found.task_rule(name) for name in "abcd"] == [
        ("recovery", 0.9),
        None,
        ("drop", 0.1),
        ("drop", 0.02),
    ]
    assert found.task_margin(delta("b")) is None
    assert found.task_margin(delta("d")) == 0.02
    assert rules(recovery="none").task_rule("t") is None
    assert rules(perplexity_ratio="none").perplexity_ratio is None


def test_recovery_where_lower_is_better_and_where_there_is_nothing():
    found = rules(recovery=0.8)
    assert found.task_margin(delta(baseline=2.0, higher_is_better=False)) == pytest.approx(0.5)
    assert found.task_margin(delta(baseline=0.0)) is None


# --- single verdicts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-0.5, "non-inferior"),
        (0.0, "non-inferior"),
        (0.0103, "non-inferior"),
        (0.0105, "inconclusive"),
        (0.0495, "inconclusive"),
        (0.0497, "inferior"),
    ],
)
def test_the_interval_decides(value, expected):
    (found,) = judge([question("perplexity", value)])
    assert found["verdict"] == expected
    assert found["margin"] == 0.03
    assert found["low"] == pytest.approx(value - 1.959964 * ERROR)


def test_holm_is_statsmodels_holm():
    generator = np.random.default_rng(1)
    for count in (1, 2, 7):
        p = generator.random(count) ** 3
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, 0.01, 0.5]) == pytest.approx([0.03, 0.03, 0.5])
    assert holm([]) == []


def test_asking_often_needs_stronger_evidence():
    worse = question("task:a", 0.051)  # alone: p = 0.018
    others = [question(f"task:{i}", 0.0) for i in range(3)]
    assert judge([worse])[0]["verdict"] == "inferior"
    found = judge([worse, *others])[0]
    assert found["verdict"] == "inconclusive"
    assert found["adjusted_p"] == pytest.approx(4 * 0.01786, rel=0.01)
    # What does not count costs nothing.
    silent = [question(f"task:{i}", 0.0, counts=False) for i in range(3)]
    found, *rest = judge([worse, *silent])
    assert found["verdict"] == "inferior"
    assert "adjusted_p" not in rest[0]


def test_more_documents_would_decide():
    # Half width 0.0196 at 400 documents; room 0.0098: four times as many.
    assert more_documents(estimate(0.0202), 0.03, 400, 1) == pytest.approx(1200, abs=3)
    # Outside, with 80% power: (2.8016 / 1)² times as many for a loss one error beyond the margin.
    assert more_documents(estimate(0.04), 0.03, 400, 1) == pytest.approx(400 * 6.849, abs=3)
    assert more_documents(estimate(0.04), 0.03, 400, 5) > more_documents(
        estimate(0.04), 0.03, 400, 1
    )
    assert more_documents(estimate(0.03), 0.03, 400, 1) is None
    (found,) = judge([question("perplexity", 0.03)])
    assert "more_documents" not in found
    assert "too near the margin" in found["reason"]


def test_so_many_more_documents_do_decide():
    """With the number promised, the upper end comes inside in half of all repetitions."""
    generator = np.random.default_rng(2)
    first = paired_mean((generator.random(500) < 0.02).astype(float), binary=True)
    more = more_documents(first, 0.03, 500, 1)
    draws = (generator.random((1000, 500 + more)) < first.value).astype(float)
    decided = np.mean([paired_mean(row, binary=True).high <= 0.03 for row in draws])
    assert 0.4 <= decided <= 0.7


# --- the model


def verdict(name, verdict, counts=True):
    return {"name": name, "verdict": verdict, "counts": counts, "rule": ""}


@pytest.mark.parametrize(
    ("parts", "every_task", "expected"),
    [
        ({"perplexity": "non-inferior", "task:a": "inconclusive", "tasks": "non-inferior"}, 0, 1),
        ({"perplexity": "non-inferior", "task:a": "inconclusive", "tasks": "non-inferior"}, 1, 2),
        ({"perplexity": "inconclusive", "tasks": "non-inferior"}, 0, 2),
        ({"perplexity": "non-inferior", "task:a": "inferior", "tasks": "non-inferior"}, 0, 0),
        ({"perplexity": "non-inferior", "task:a": "not comparable"}, 0, 3),
        ({"perplexity": "inferior", "task:a": "not comparable"}, 0, 0),
        ({"own_perplexity": "inconclusive", "perplexity": "non-inferior"}, 0, 2),
        ({}, 0, 2),
    ],
)
def test_the_model_s_verdict(parts, every_task, expected):
    names = ["inferior", "non-inferior", "inconclusive", "not comparable"]
    found = model_verdict([verdict(*part) for part in parts.items()], bool(every_task))
    assert found["verdict"] == names[expected]
    assert found["counts"] is bool(parts)
    assert ("reason" in found) is (expected != 1)


def test_what_does_not_count_does_not_decide():
    found = model_verdict(
        [verdict("perplexity", "non-inferior"), verdict("task:a", "inferior", False)], False
    )
    assert found["verdict"] == "non-inferior"


# --- gates


def sentences(questions, gate=None, smoke=()):
    gate = gate or GateRules()
    found = judge(questions)
    found.append(model_verdict(found, gate.every_task))
    return {g["name"]: (g["passed"], g["says"]) for g in gates(found, gate, smoke)}


def test_gates_say_what_was_found_and_what_would_help():
    found = sentences(
        [
            question("perplexity", 0.002, error=0.001, margin=0.05),
            question("task:a", 0.2),
            question("task:b", 0.025),
            Question("task:c", "drop 0.03", True, reason="task c has 0 documents"),
            question("task:d", 0.2, counts=False),
            question("tasks", 0.025),
        ]
    )
    assert {name: passed for name, (passed, _) in found.items()} == {
        "perplexity": True,
        "task:a": False,
        "task:b": True,
        "task:c": False,
        "tasks": False,
    }
    assert found["perplexity"][1] == (
        "perplexity is 0.2% worse (95% interval of the loss: 0.004% to 0.396%), the margin is 5% "
        "(drop 0.03): non-inferior"
    )
    assert "task a is 0.2 worse" in found["task:a"][1]
    assert "quantize search" in found["task:a"][1]
    assert "the tasks' average decides" in found["task:b"][1]
    assert "task c is not comparable: task c has 0 documents" in found["task:c"][1]
    assert "more documents would decide" in found["tasks"][1]
    assert "evaluate.gate.inconclusive: pass" in found["tasks"][1]


def test_the_recipe_says_what_passes():
    unsure = [question("perplexity", 0.0, margin=0.05), question("task:a", 0.025)]
    assert sentences(unsure)["task:a"][0]
    assert not sentences(unsure, GateRules(every_task=True))["task:a"][0]
    assert sentences(unsure, GateRules(every_task=True, inconclusive="pass"))["task:a"][0]
    bad = [question("perplexity", 0.5)]
    assert not sentences(bad, GateRules(inconclusive="pass"))["perplexity"][0]


# --- how often the gate is wrong


TASKS, DOCUMENTS, TRIALS = 4, 500, 1500


def outcomes(true_loss, margin, *, discordance=0.08, seed=3):
    """Share of runs with any inferior verdict, and with a non-inferior average."""
    generator = np.random.default_rng(seed)
    share = (discordance + true_loss) / 2
    draws = generator.random((TRIALS, TASKS, DOCUMENTS))
    values = (draws < share).astype(float) - (draws > 1 - (share - true_loss))
    alarms, passes = 0, 0
    for run in values:
        estimates = [paired_mean(row, binary=True) for row in run]
        questions = [
            Question(f"task:{i}", "", True, found, margin, DOCUMENTS)
            for i, found in enumerate(estimates)
        ]
        questions.append(Question("tasks", "", True, average(estimates), margin, DOCUMENTS))
        names = [found["verdict"] for found in judge(questions)]
        alarms += "inferior" in names
        passes += names[-1] == "non-inferior"
    return alarms / TRIALS, passes / TRIALS


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_loss_at_the_margin_is_called_wrongly_at_most_at_the_nominal_rate(margin):
    alarms, passes = outcomes(margin, margin)
    # Nominal 0.025 each, over all five verdicts together; simulation error 0.004.
    assert alarms <= 0.037
    assert 0.01 <= passes <= 0.037


def test_no_loss_within_a_margin_passes_and_never_alarms():
    alarms, passes = outcomes(0.0, 0.03)
    assert alarms == 0
    assert passes > 0.95


def test_a_loss_beyond_the_margin_is_caught():
    alarms, passes = outcomes(0.06, 0.02)
    assert alarms > 0.95
    assert passes == 0
