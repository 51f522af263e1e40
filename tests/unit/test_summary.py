"""The end of a run, on a narrow terminal and as JSON."""

import io
import json

import pytest
from records_fixture import baseline_side, candidate_side, card_inputs, new_store, stage_context
from rich.console import Console

from quantize.report.results import bytes_text, nats
from quantize.report.summary import places_text, summary_json, summary_table
from quantize.stages import card

PLACES = {
    "artifact": "/store/compress/" + "0123456789abcdef" * 4 + "/model",
    "card": "/store/card/README.md",
}


def card_record(tmp_path, before, after, without=()):
    store = new_store(tmp_path)
    inputs = card_inputs(store, before, after)
    inputs = {role: item for role, item in inputs.items() if role not in without}
    context = stage_context(tmp_path, store, "card", inputs)
    card.run(context)
    return json.loads((context.files / "record.json").read_text(encoding="utf-8"))


def shown(record, width=80):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(summary_table(record))
    return console.file.getvalue()


def line(text, start):
    """Words of the first line that begins so; the verdicts come after the numbers."""
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_all_numbers_fit_80_columns(tmp_path):
    record = card_record(tmp_path, baseline_side(), candidate_side())
    text = shown(record)
    assert max(map(len, text.splitlines())) <= 80
    perplexity = record["compare"]["perplexity"]
    assert line(text, "Perplexity")[1:] == [
        f"{perplexity['baseline']:.4f}",
        f"{perplexity['candidate']:.4f}",
        f"×{perplexity['ratio']:.4f}",
        f"{perplexity['ratio_low']:.4f}",
        "to",
        f"{perplexity['ratio_high']:.4f}",
    ]
    kl = record["compare"]["divergence"]
    cells = [nats(kl["mean"]), nats(kl["mean_low"]), "to", nats(kl["mean_high"])]
    assert line(text, "KL divergence, mean")[-4:] == cells
    assert line(text, "Top-1 agreement")[-1].endswith("%")
    assert line(text, "valley_mc, acc")[2:5] == ["0.7500", "0.7250", "-0.0250"]
    assert line(text, "1 worse, 0 better of 40")
    assert line(text, "Weights")[1:] == ["1.23", "MB", "432", "kB", "×0.350"]
    assert line(text, "First token, median")[3:] == ["41.5", "ms", "41.5", "ms"]
    assert line(text, "Output tokens/s")[2:] == ["123.4", "171.2"]
    assert line(text, "Smoke checks passed")[3:] == ["2", "of", "2", "2", "of", "2"]
    assert "…" not in text
    # A broken path cannot be copied.
    assert f"artifact  {PLACES['artifact']}" in places_text(PLACES).splitlines()
    model = record["compare"]["verdicts"][-1]
    assert f"verdict: {model['verdict']}" in text
    assert "gate " not in text
    assert "not measured" not in text


def test_failures_and_gaps_are_said(tmp_path):
    after = candidate_side(noise=3)
    after.failing = frozenset({"count"})
    after.not_measured = [{"what": "KV-cache size", "why": "the server does not say"}]
    record = card_record(tmp_path, baseline_side(), after)
    text = " ".join(shown(record).split())
    failed = [gate for gate in record["compare"]["gates"] if not gate["passed"]]
    assert failed
    for gate in failed:
        assert f"gate {gate['name']}: {gate['says']}" in text
    assert "smoke check failed: count: not empty" in text
    assert "not measured: KV-cache size (candidate): the server does not say" in text
    assert "1 of 2" in text


def test_without_evaluation(tmp_path):
    without = ("baseline", "candidate", "compare")
    record = card_record(tmp_path, baseline_side(), candidate_side(), without)
    text = shown(record)
    assert "quality was not measured: the recipe asks for no evaluation" in text
    assert "Perplexity" not in text
    values = summary_json(record, PLACES)
    assert set(values) == {"recipe", "method", "scheme", "size", "places"}


def test_names_are_not_markup(tmp_path):
    record = card_record(tmp_path, baseline_side(), candidate_side())
    record["compare"]["tasks"][0]["name"] = "[red]x[/nothing]"
    record["compare"]["not_measured"] = [{"what": "[b]y", "why": "[/b]"}]
    text = shown(record)
    assert "[red]x[/nothing]" in text
    assert "not measured: [b]y: [/b]" in text


def test_json_has_the_records_numbers(tmp_path):
    record = card_record(tmp_path, baseline_side(), candidate_side())
    values = json.loads(json.dumps(summary_json(record, PLACES)))
    compare = record["compare"]
    for name in ("perplexity", "divergence", "tasks", "gates", "smoke_failed", "not_measured"):
        assert values[name] == compare[name]
    assert values["size"]["ratio"] == pytest.approx(432_109 / 1_234_567)
    assert values["serving"]["candidate"]["output_tokens_per_second"] == 171.2
    assert values["smoke"]["candidate"] == {"passed": 2, "checks": 2}
    assert values["places"] == PLACES


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999 bytes"),
        (12_345_678, "12.3 MB"),
        (4_321_098, "4.32 MB"),
        (141_107_412_992, "141 GB"),
    ],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00051, "0.00051"), (4.44e-5, "4.4e-05"), (1.25, "1.25000")]
)
def test_nats(value, text):
    assert nats(value) == text
