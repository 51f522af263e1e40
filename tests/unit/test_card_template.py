"""A template of the user's own: blocks, errors with their lines, and what it cannot do."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from checkpoints import recipe as tiny_recipe
from checkpoints import write_checkpoint
from click.testing import CliRunner
from records_fixture import (
    RECIPE,
    artifact,
    baseline_side,
    candidate_side,
    card_inputs,
    new_store,
    stage_context,
)

from quantize.checklist import preflight
from quantize.cli import main
from quantize.errors import QuantizeError, SourceError
from quantize.report.card import card_variables, differences, render_card
from quantize.report.card_template import VARIABLES, check_template
from quantize.report.markdown import environment
from quantize.stages import card as stage
from quantize.stages import publish
from quantize.stages.base import Resolved

OWN = """{% extends "card.md.j2" %}
{% block summary %}
Ours: {{ record.recipe.name|text }}, {{ size_ratio }} of the size.
{% endblock %}
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    store = new_store(folder)
    inputs = card_inputs(store, baseline_side(), candidate_side())
    return stage.build_record(stage_context(folder, store, "card", inputs))


def test_a_block_is_overridden_and_the_rest_stays(record):
    card = render_card(record, OWN)
    shipped = render_card(record)
    assert "\nOurs: tiny-llama-awq, 0.350 of the size.\n" in card
    assert "BF16's score kept" not in card
    assert card.split("## Size and memory")[1] == shipped.split("## Size and memory")[1]
    assert differences(card, record, OWN) == []
    assert differences(card, record)
    assert differences(shipped, record, OWN)


def test_what_a_template_may_print_is_known(record):
    assert set(card_variables(record)) == VARIABLES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n{% if %}", "card.j2:2: Expected an expression"),
        ("a\n\n{{ method|nosuch }}", "card.j2:3: No filter named 'nosuch'"),
        ("{{ methods|text }}", "card.j2:1: a card has no 'methods'"),
        ("\n{% extends 'other.j2' %}", "card.j2:2: there is no template but 'card.md.j2'"),
        ("{% include record.recipe.name %}", "card.j2:1: there is no template but 'card.md.j2'"),
    ],
)
def test_a_mistake_is_found_without_a_record(tmp_path, text, says):
    path = tmp_path / "card.j2"
    path.write_text(text)
    assert says in "\n".join(finding.message for finding in check_template(path))


def test_the_shipped_template_and_one_that_extends_it_have_no_mistake(tmp_path):
    templates = environment()
    for text in (templates.loader.get_source(templates, "card.md.j2")[0], OWN):
        path = tmp_path / "card.j2"
        path.write_text(text)
        assert check_template(path) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n\n{{ method }}", "own.j2:3: the template prints 'AWQ"),
        ("{{ record.nothing|text }}", "own.j2:1: .* has no attribute 'nothing'"),
        ("\n{{ ''.__class__.__mro__|text }}", "own.j2:2: .*unsafe"),
        ("{{ record.__init__.__globals__|text }}", "own.j2:1: "),
        ("{{ record.update({'a': 1})|text }}", "own.j2:1: .*unsafe"),
        ("{% include '/etc/passwd' %}", "own.j2:1: "),
        ("{{ (1 / 0)|text }}", "own.j2:1: division by zero"),
        ("{% for n in range(10 ** 9) %}{{ n }}{% endfor %}", "own.j2:1: Range too big"),
    ],
)
def test_a_mistake_that_needs_the_record_has_its_line(record, text, says):
    with pytest.raises(SourceError, match=says):
        render_card(record, text, "own.j2")


def test_a_record_of_another_kind_is_told_so(record):
    with pytest.raises(SourceError, match=r"not that of a card: KeyError: 'base_models'"):
        render_card({key: value for key, value in record.items() if key != "base_models"})


# --- the stage


def context(tmp_path, text=OWN):
    path = tmp_path / "own.md.j2"
    path.write_text(text)
    store = new_store(tmp_path)
    inputs = card_inputs(store, baseline_side(), candidate_side())
    recipe = {**RECIPE, "publish": {"folder": "out", "card_template": "own.md.j2"}}
    made = stage_context(tmp_path, store, "card", inputs, recipe)
    digests = {"card_template": sha256(text.encode()).hexdigest()}
    made.resolved = replace(made.resolved, digests=digests, paths={"card_template": path})
    return made


def test_the_stage_keeps_the_template_and_publishes_all(tmp_path):
    made = context(tmp_path)
    stage.run(made)
    names = sorted(p.relative_to(made.files).as_posix() for p in made.files.rglob("*.*"))
    pictures = ["perplexity-delta-log-p", "perplexity-kl-by-position", "tasks"]
    assert names == [
        "README.md",
        "card.md.j2",
        *(f"plots/{name}.png" for name in pictures),
        "record.json",
    ]
    record = json.loads((made.files / "record.json").read_text())
    card = (made.files / "README.md").read_text()
    assert sorted(record["plots"]) == pictures
    assert differences(card, record, (made.files / "card.md.j2").read_text()) == []
    assert record["card_template"] == sha256(OWN.encode()).hexdigest()
    for name in pictures:
        assert f"](quantize/plots/{name}.png)" in card
        assert (made.files / "plots" / f"{name}.png").stat().st_size < 80_000
    files = {name: (made.files / name).read_bytes() for name in names}
    files["eval_results/gsm8k.yaml"] = b"[]"
    card_artifact = artifact(made.store, "card", "k", files)
    publishing = replace(made, inputs={**made.inputs, "card": card_artifact})
    published = publish.collect(publishing).paths
    assert {
        "README.md",
        "quantize/record.json",
        "quantize/card.md.j2",
        "quantize/plots/tasks.png",
        ".eval_results/gsm8k.yaml",
    } <= published.keys()


def test_the_same_record_draws_the_same_bytes(tmp_path):
    sides = [tmp_path / "a", tmp_path / "b"]
    for side in sides:
        side.mkdir()
        stage.run(context(side))
    first, second = (
        {p.name: p.read_bytes() for p in side.joinpath("files").rglob("*.*")} for side in sides
    )
    assert first.keys() == second.keys()
    for name in first.keys() - {"record.json"}:
        assert first[name] == second[name], name


def test_a_template_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    override = "publish.card_template=nosuch.j2"
    done = CliRunner().invoke(main, ["plan", "tiny-llama-fp8", "--set", override])
    assert done.exit_code == 3
    assert "publish.card_template: there is no file 'nosuch.j2'" in done.stderr


def test_a_template_changed_after_the_plan_is_refused(tmp_path):
    made = context(tmp_path)
    made.resolved.paths["card_template"].write_text("{{ method|text }}")
    with pytest.raises(SourceError, match="changed after the run began"):
        stage.run(made)


def test_the_template_is_in_the_key(tmp_path):
    first = context(tmp_path).resolved
    other = replace(first, digests={"card_template": "0" * 64})
    assert stage.key_inputs(first, "card") != stage.key_inputs(other, "card")


def test_preflight_finds_it_before_anything_runs(tmp_path):
    path = tmp_path / "own.md.j2"
    path.write_text("{{ metod|text }}")
    folder = write_checkpoint(tmp_path / "checkpoint")
    resolved = Resolved(tiny_recipe(), folder, "cpu", {}, {"model": folder, "card_template": path})
    with pytest.raises(QuantizeError, match=r"own.md.j2:1: a card has no 'metod'"):
        preflight(resolved, tmp_path / "store", {"card"})
