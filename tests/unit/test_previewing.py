"""`quantize card`: the card of a record without publishing, by its own template or another."""

import json
from hashlib import sha256

import pytest
from click.testing import CliRunner
from records_fixture import (
    artifact,
    baseline_side,
    candidate_side,
    card_inputs,
    new_store,
    stage_context,
)

from quantize.cli import main
from quantize.report.card import render_card
from quantize.stages import card as stage

OWN = "# {{ record.recipe.name|text }}, ours\n"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    store = new_store(folder)
    inputs = card_inputs(store, baseline_side(), candidate_side())
    return stage.build_record(stage_context(folder, store, "card", inputs))


def published(folder, record, template=None):
    (folder / "quantize").mkdir(parents=True)
    (folder / "quantize" / "record.json").write_text(json.dumps(record))
    if template is not None:
        (folder / "quantize" / "card.md.j2").write_text(template)
    return folder


def quantize(*arguments):
    return CliRunner().invoke(main, ["card", *map(str, arguments)])


def test_the_card_of_a_published_folder_and_of_a_store(tmp_path, record):
    folder = published(tmp_path / "out", record)
    done = quantize(folder, "--store", tmp_path / "none")
    assert (done.exit_code, done.stdout) == (0, render_card(record))
    store = new_store(tmp_path)
    artifact(store, "card", "k" * 64, {"record.json": record}, recipe="tiny-llama-awq")
    folder = store.path("card", "k" * 64)
    assert quantize(folder, "--store", store.root).stdout == render_card(record)


def test_it_is_written_to_a_file_that_is_not_there(tmp_path, record):
    folder, output = published(tmp_path / "out", record), tmp_path / "card.md"
    done = quantize(folder, "-o", output)
    assert (done.exit_code, done.stdout) == (0, f"wrote {output}\n")
    assert output.read_text() == render_card(record)
    output.write_text("mine")
    done = quantize(folder, "-o", output)
    assert done.exit_code == 2
    assert output.read_text() == "mine"
    assert quantize(folder, "-o", output, "--force").exit_code == 0
    assert output.read_text() == render_card(record)


def test_a_card_with_a_template_of_its_own_is_made_with_it(tmp_path, record):
    own = {**record, "card_template": sha256(OWN.encode()).hexdigest()}
    folder = published(tmp_path / "a", own, OWN)
    assert quantize(folder).stdout == "# tiny-llama-awq, ours\n"
    folder = published(tmp_path / "b", own, OWN + "More.")
    done = quantize(folder)
    assert done.exit_code == 3
    assert "is not the template that this card was made with" in done.stderr
    other = tmp_path / "other.j2"
    other.write_text("{{ audit.checks }}")
    assert quantize(folder, "--template", other).stdout == "1"


def test_a_mistake_in_a_template_has_its_line(tmp_path, record):
    template = tmp_path / "mine.j2"
    template.write_text("a\n{{ method }}")
    done = quantize(published(tmp_path / "out", record), "--template", template)
    assert done.exit_code == 3
    assert f"{template}:2: the template prints 'AWQ" in done.stderr


def test_an_older_record_is_told_so(tmp_path, record):
    old = {**record, "schema": "quantize.card/2"}
    done = quantize(published(tmp_path / "out", old))
    assert done.exit_code == 3
    assert "of another version of quantize: quantize.card/2" in done.stderr
