"""The loopback Hub's fault plans from a file, and the cards that it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import PlanError, load_plan
from tests.hub_server.cards import check_card


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ("{", "is not JSON"),
        ('{"pattern": "x"}', "must hold a list"),
        ('[{"drop": "after"}]', "fault 1: needs a pattern"),
        ('[{"pattern": "x", "drop": "later"}]', "drop must be before or after, not 'later'"),
        ('[{"pattern": "(", "drop": "after"}]', "is not a regular expression"),
        (
            '[{"pattern": "x", "status": 500}, {"pattern": "x", "satus": 1}]',
            "fault 2: satus is not",
        ),
        ('[{"pattern": "x", "times": true, "status": 500}]', "times must be int, not True"),
        ('[{"pattern": "x", "times": 2}]', "says nothing that goes wrong: status"),
    ],
)
def test_plans_that_are_wrong(tmp_path: Path, plan: str, problem: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan)
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert problem in str(caught.value)
    assert "plan.json" in str(caught.value)
    command = [sys.executable, "-m", "tests.hub_server", "--port", "0", "--faults", str(path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, problem in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_a_plan_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        '[{"pattern": "POST .*/commit/", "status": 429, "headers": {"Retry-After": "1"}}]'
    )
    [fault] = load_plan(path)
    assert (fault.status, fault.headers, fault.times) == (429, {"Retry-After": "1"}, 1)


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("license: apache2", "license"),
        ("license: [mit, none]", "license"),
        ("language: English", "language"),
        ("base_model: model.safetensors", "base_model"),
        ("base_model_relation: quantised", "base_model_relation"),
        ("tags: {a: b}", "tags"),
        ("model-index: [{name: x, results: [{task: {type: t}, metrics: []}]}]", "dataset"),
        ("a: [", "Invalid YAML"),
        ("- a", "not a mapping"),
    ],
)
def test_cards_that_the_hub_refuses(card: str, problem: str) -> None:
    findings = check_card(f"---\n{card}\n---\n# A model\n")
    assert any(problem in error for error in findings.errors), findings


def test_cards_that_it_takes() -> None:
    good = """---
license: [apache-2.0]
language: [en, zh-Hant]
base_model: acme/base
base_model_relation: quantized
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {type: valley, name: Valley}
    metrics: [{type: acc, value: 0.5}]
---
"""
    assert check_card(good) == check_card("---\nlicense: mit\n---\n")
    assert check_card("# no metadata").warnings
    assert check_card("---\nlicense: other\n---\n").warnings
