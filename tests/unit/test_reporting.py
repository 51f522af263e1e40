"""`quantize report`: what a RECORD may be, what is written, and clear words where it is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_fixture as fixture
from records_fixture import artifact

from quantize.errors import SourceError, UsageError
from quantize.reporting import distinct, load, report
from quantize.store import Store

KEY = "a" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def with_card(store, record=None, details=True, key=KEY):
    """A committed card, and the comparison that it was made from."""
    record = record or named("my-awq")
    found = artifact(store, "card", key, {"record.json": record}, recipe=record["recipe"]["name"])
    if details and store.get("compare", fixture.COMPARE_KEY) is None:
        files = {"record.json": record["compare"], "details.json": fixture.details()}
        artifact(store, "compare", fixture.COMPARE_KEY, files)
    return found


def named(name):
    record = fixture.card()
    record["recipe"]["name"] = name
    return record


def published(folder, record):
    (folder / "quantize").mkdir(parents=True)
    (folder / "quantize" / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


# --- what a RECORD may be


def test_a_file_a_folder_and_a_name_mean_the_same_card(store, tmp_path):
    card = with_card(store)
    run = tmp_path / "run"
    run.mkdir()
    places = {"places": {"record": str(card.path / "record.json")}}
    (run / "result.json").write_text(json.dumps(places))
    for name in (card.path / "record.json", card.path, run, "my-awq"):
        subject = load(str(name), store)
        assert subject.record["recipe"]["name"] == subject.label == "my-awq"
        assert subject.details is not None and subject.details["flips"]["valley_qa"]


def test_details_are_those_of_the_records_own_store(store, tmp_path):
    card = with_card(store)
    elsewhere = Store(tmp_path / "elsewhere")
    assert load(str(card.path), elsewhere).details is not None


def test_a_published_record_finds_its_details_in_the_given_store(store, tmp_path):
    folder = published(tmp_path / "out", fixture.card())
    subject = load(str(folder), store)
    assert subject.details is None
    assert "evaluation documents are not published" in subject.no_details
    with_card(store)
    assert load(str(folder), store).details is not None


def test_a_record_that_names_no_comparison_is_reported_without_details(store, tmp_path):
    record = fixture.card()
    del record["artifacts"]
    subject = load(str(published(tmp_path / "out", record)), store)
    assert subject.details is None
    assert "does not name the comparison" in subject.no_details


@pytest.mark.parametrize("key", ["../../secrets", "/etc", "", 7, None])
def test_a_key_that_is_none_is_no_path(store, tmp_path, key):
    record = fixture.card()
    record["artifacts"] = {"compare": key}
    assert load(str(published(tmp_path / "out", record)), store).details is None


def test_a_recipe_file_means_its_card(store, tmp_path):
    from quantize.session import Session

    root = Path(__file__).resolve().parents[2]
    recipe = root / "recipes" / "tiny-llama-awq.yaml"
    session = Session.open(str(recipe), (), store.root, online=False)
    key = next(entry.key for entry in session.plan.stages if entry.id == "card")
    if key is None:
        pytest.skip("the plan does not know the card's key before earlier stages ran")
    with_card(store, key=key)
    assert load(str(recipe), store).record["recipe"]["name"] == "my-awq"


# --- what it may not be


def fails(error, name, store):
    with pytest.raises(error) as caught:
        load(str(name), store)
    assert caught.value.hint
    return caught.value.message


def test_a_recipe_that_was_not_run_is_told_so(store):
    message = fails(UsageError, "tiny-llama-awq", store)
    assert message.startswith("there is no card of tiny-llama-awq as it stands in ")
    assert "made:" not in message


def test_a_card_of_other_settings_is_not_taken_for_the_recipes_own(store):
    card = with_card(store, named("tiny-llama-awq"))
    assert str(card.path) in fails(UsageError, "tiny-llama-awq", store)


def test_an_unknown_name_is_told_what_was_looked_for(store):
    assert "no file or folder, no recipe, and no card" in fails(UsageError, "lama", store)


def test_two_cards_of_one_name_are_listed(store):
    with_card(store)
    with_card(store, key="b" * 64)
    message = fails(UsageError, "my-awq", store)
    assert "2 cards" in message and "b" * 64 in message


def test_a_folder_without_a_record(store, tmp_path):
    message = fails(UsageError, tmp_path, store)
    assert "neither record.json nor quantize/record.json" in message


def test_a_run_without_a_card(store, tmp_path):
    (tmp_path / "result.json").write_text('{"places": {"logs": "x"}}')
    assert "made no card" in fails(UsageError, tmp_path, store)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ('{"schema": "quantize.card/3", "size": NaN}', "it holds NaN, which is no number"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is no record of quantize"),
        ("{}", "is no record of quantize"),
        ('{"schema": "quantize.compare/2"}', "the record of one stage (quantize.compare/2)"),
        ('{"schema": "quantize.card/1"}', "another version of quantize: quantize.card/1"),
        ('{"schema": "quantize.card/3"}', "recipe is missing; size is missing"),
    ],
)
def test_a_file_that_is_no_card(store, tmp_path, text, says):
    file = tmp_path / "record.json"
    file.write_text(text)
    assert says in fails(SourceError, file, store)


def test_a_file_that_is_not_text(store, tmp_path):
    file = tmp_path / "record.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in fails(SourceError, file, store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(store, tmp_path):
    file = tmp_path / "record.json"
    file.write_text("{}")
    file.chmod(0)
    assert "cannot read" in fails(SourceError, file, store)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["tasks"][0].pop("detectable"), "compare.tasks[0].detectable is missing"),
        (
            lambda c: c["verdicts"][1].update(verdict="fine"),
            "compare.verdicts[1].verdict is 'fine'",
        ),
        (lambda c: c["perplexity"].update(ratio=None), "compare.perplexity.ratio is null, not a n"),
        (
            lambda c: c["perplexity"].update(ratio="1.0"),
            "compare.perplexity.ratio is str, not a nu",
        ),
        (lambda c: c["tasks"][0].update(lost=True), "compare.tasks[0].lost is bool, not int"),
        (lambda c: c.update(tasks={}), "compare.tasks is dict, not a list"),
        (lambda c: c["lint"].update(languages=[]), "compare.lint.languages is list, not an object"),
        (lambda c: c.clear(), "and 9 more"),
    ],
)
def test_the_place_that_is_wrong_is_named(store, tmp_path, change, says):
    record = fixture.card()
    change(record["compare"])
    assert says in fails(SourceError, published(tmp_path / "out", record), store)


def test_details_of_another_shape_are_named(store):
    card = with_card(store)
    file = store.path("compare", fixture.COMPARE_KEY) / "details.json"
    details = fixture.details()
    del details["flips"]["valley_mc"][0]["prompt"]
    file.write_text(json.dumps(details))
    message = fails(SourceError, card.path, store)
    assert "details.flips.valley_mc[0].prompt is missing" in message


# --- what is written


def test_a_page_and_its_pictures(store, tmp_path):
    card = with_card(store)
    page, plots = tmp_path / "deep" / "page.html", tmp_path / "plots"
    written = report([str(card.path)], page, plots, store)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = {path.name for path in plots.iterdir()}
    assert names == {path.name for path in written.plots}
    for picture in ("verdicts", "tasks", "retention", "serving", "perplexity-delta-log-p"):
        assert {f"{picture}.png", f"{picture}.svg"} <= names
    for path in written.plots:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in start + b"<svg"
    assert "mathdefault" not in "".join(p.read_text() for p in plots.glob("*.svg"))


def test_the_same_record_gives_the_same_bytes(store, tmp_path):
    card = with_card(store)
    for name in ("one", "two"):
        report([str(card.path)], tmp_path / f"{name}.html", tmp_path / name, store)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_pictures_of_a_comparison(store, tmp_path):
    cards = [with_card(store), with_card(store, fixture.worse_card(), key="b" * 64)]
    names = [str(card.path) for card in cards]
    written = report(names, tmp_path / "page.html", tmp_path / "plots", store)
    stems = {path.stem for path in written.plots}
    assert {"pareto-size-tasks", "pareto-throughput-perplexity", "compared-perplexity"} <= stems


def test_names_with_a_meaning_to_matplotlib_are_drawn(store, tmp_path):
    record = fixture.card()
    record["compare"]["tasks"][0]["name"] = "$\\frac{1}{$ _x"
    card = with_card(store, record, details=False)
    assert report([str(card.path)], tmp_path / "page.html", tmp_path / "plots", store).plots


def test_only_a_report_is_overwritten(store, tmp_path):
    card = with_card(store)
    page = tmp_path / "page.html"
    for _ in range(2):
        report([str(card.path)], page, None, store)
    page.write_text("<html>my notes</html>")
    with pytest.raises(UsageError, match="exists and is no report"):
        report([str(card.path)], page, None, store)
    assert page.read_text() == "<html>my notes</html>"
    with pytest.raises(UsageError, match="is a folder"):
        report([str(card.path)], tmp_path, None, store)


def test_a_place_that_cannot_be_written(store, tmp_path):
    card = with_card(store)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        report([str(card.path)], tmp_path / "file" / "page.html", None, store)
    with pytest.raises(UsageError, match="cannot write to"):
        report([str(card.path)], tmp_path / "page.html", tmp_path / "file" / "plots", store)


def test_equal_names_are_told_apart(store):
    card = with_card(store)
    other = fixture.worse_card()
    other["recipe"]["name"] = "my-awq"
    names = [str(card.path), str(with_card(store, other, key="b" * 64).path), str(card.path)]
    labels = [subject.label for subject in distinct([load(name, store) for name in names])]
    assert labels == [
        "my-awq (awq, W4A16_ASYM)",
        "my-awq (rtn, W4A16)",
        "my-awq (awq, W4A16_ASYM) #2",
    ]


# --- the command


def quantize(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "quantize", "report", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(store, tmp_path):
    with_card(store)
    done = quantize("my-awq", "--store", store.root, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "wrote my-awq.report.html\n"), done.stderr
    assert "<h1>my-awq</h1>" in (tmp_path / "my-awq.report.html").read_text()
    done = quantize("my-awq", "--store", store.root, "--json", "-o", "x.html", cwd=tmp_path)
    assert json.loads(done.stdout) == {"report": "x.html", "plots": []}


def test_a_name_in_a_record_cannot_choose_the_file(store, tmp_path):
    record = fixture.card()
    record["recipe"]["name"] = "../../../etc/passwd"
    folder = published(tmp_path / "out", record)
    work = tmp_path / "a" / "b" / "c" / "d"
    work.mkdir(parents=True)
    done = quantize(folder, "--store", store.root, cwd=work)
    assert done.stdout == "wrote etc-passwd.report.html\n", done.stderr
    shutil.rmtree(folder)
    done = quantize(folder, "--store", store.root, cwd=work)
    assert done.returncode == 2
    assert "no file or folder, no recipe" in done.stderr
