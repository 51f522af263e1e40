"""Every figure on a card is the record's: each one moves with it, and each is rounded right."""

import copy
import difflib
import re

import pytest
from records_fixture import (
    baseline_side,
    candidate_side,
    card_inputs,
    new_store,
    resolved_recipe,
    stage_context,
)

from quantize import capacity
from quantize.report.card import differences, render_card
from quantize.stages import card as stage

NUMBER = re.compile(r"(?<![\w.])[-+×]?\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?%?(?![\w])")
CONSTANTS = {
    "95%": "how sure the intervals are",
    "1": "top-1: the most likely token",
}
"""Figures of the template's own words, and what they are."""


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    store = new_store(folder)
    before, after = baseline_side(), candidate_side()
    before.own_text = after.own_text = True
    inputs = card_inputs(store, before, after)
    made = stage.build_record(stage_context(folder, store, "card", inputs))
    made["compress"]["unvisited"] = ["model.layers.3.mlp.experts.5.up_proj"]
    made["compare"]["retention"] = [
        {
            "name": "valley_mc",
            "metric": "acc",
            "base": 0.3125,
            "fine_tuned": 0.75,
            "candidate": 0.7375,
            "gain": 0.4375,
            "gain_low": 0.31,
            "gain_high": 0.56,
            "retained": 0.9714,
            "retained_low": 0.8833,
            "retained_high": 1.0612,
        }
    ]
    made["compare"]["noise"] = {
        "perplexity_ratio": 1.000123,
        "kl_mean": 0.000456,
        "tokens_changed": 0.5,
        "tasks": [{"name": "valley_mc", "difference": 0.025, "flips": 3, "documents": 40}],
    }
    rate = {"baseline": 0.125, "candidate": 0.25, "got_worse": 4, "got_better": 2}
    made["compare"]["health"] = [{"name": "repeating", **rate, "mcnemar_p": 0.6875, "alarm": False}]
    made["candidate"]["health"] = {"prompts": 24, "max_tokens": 160}
    return made


def numbers(card):
    """Every figure of the card, by line."""
    return [NUMBER.findall(line) for line in card.split("\n")]


def leaves(value, path=()):
    """(path, value) of every number, and of every string with a digit in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*path, key))
        elif type(item) in (int, float) or (isinstance(item, str) and re.search(r"\d", item)):
            yield (*path, key), item


def changed(record, path, value):
    """The record with another value in one place."""
    copied = copy.deepcopy(record)
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


def other(value):
    """Another value of the same kind, in which no digit of a string stays."""
    if isinstance(value, int):
        return 3 * value + 7
    if isinstance(value, float):
        return 1.37 * value + 0.0711
    return re.sub(r"\d", lambda found: str((int(found[0]) + 3) % 10), value)


def moved(before, after):
    """(line, place in it) of the figures in `before` that `after` does not have there."""
    if len(before) != len(after):
        return moved_lines(before, after)
    return {
        (number, place)
        for number, (old, new) in enumerate(zip(before, after, strict=True))
        for place, figure in enumerate(old)
        if new[place : place + 1] != [figure]
    }


def moved_lines(before, after):
    """The same where lines came or went: all figures of lines that are not found again."""
    old, new = ([" ".join(line) for line in side] for side in (before, after))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    same = {line for block in blocks for line in range(block.a, block.a + block.size)}
    return {
        (line, place)
        for line in set(range(len(before))) - same
        for place in range(len(before[line]))
    }


@pytest.fixture(scope="module")
def variants(record):
    """The card of the record with another value in one place, for every such place."""
    found = {}
    for path, value in leaves(record):
        found[path] = render_card(changed(record, path, other(value)))
    return found


def renamed_keys(record):
    """The names that digits can hide in: those of tools and tensor-parallel sizes."""
    yield changed(
        record, ("audit", "tensor_parallel"), {"3": [], "6": [], "12": ["x with 71 inputs"]}
    )


def test_no_figure_stands_in_the_template(record, variants, monkeypatch):
    shown = numbers(render_card(record))
    assert sum(map(len, shown)) > 150
    reached = set()
    for card in variants.values():
        reached |= moved(shown, numbers(card))
    for variant in (*renamed_keys(record), longer_lists(record)):
        reached |= moved(shown, numbers(render_card(variant)))
    gpus = tuple(capacity.Gpu(3 * gpu.gigabytes + 1, other(gpu.names), "") for gpu in capacity.GPUS)
    monkeypatch.setattr(capacity, "GPUS", gpus)
    monkeypatch.setattr(capacity, "ALLOWANCE_BYTES", 3_456_000_000)
    reached |= moved(shown, numbers(render_card(record)))
    every = {(line, place) for line, found in enumerate(shown) for place in range(len(found))}
    left = {shown[line][place] for line, place in every - reached}
    assert left <= set(CONSTANTS), left


def longer_lists(record):
    """Of what the card counts, more."""
    longer = copy.deepcopy(record)
    for block, name in (("audit", "checks"), ("audit", "kept_modules"), ("compress", "unvisited")):
        longer[block][name] *= 3
    for side in ("baseline", "candidate"):
        longer[side]["smoke"][0]["checks"] *= 4
    return longer


def test_a_figure_in_a_template_does_not_move(record):
    """The walk above would see a literal."""
    template = "{% extends 'card.md.j2' %}{% block limits %}Recovers 99.1%.{% endblock %}"
    shown = numbers(render_card(record, template))
    again = numbers(render_card(changed(record, ("size", "parameters"), 7), template))
    ((line, place),) = [
        (line, place)
        for line, found in enumerate(shown)
        for place, figure in enumerate(found)
        if figure == "99.1%"
    ]
    assert moved(shown, again)
    assert (line, place) not in moved(shown, again)


def test_every_change_of_what_is_shown_changes_the_card(record, variants):
    card = render_card(record)
    seen = {path for path, other_card in variants.items() if other_card != card}
    path = ("compare", "perplexity", "ratio")
    assert differences(card, changed(record, path, 0.9))
    compare = record["compare"]
    expected = {
        ("compare", "perplexity"): ("baseline", "candidate", "ratio", "ratio_low", "documents"),
        ("compare", "divergence"): ("mean", "mean_low", "p99", "top1_agreement", "tokens"),
        ("compare", "aggregate"): ("recovery", "recovery_low", "recovery_high", "tasks"),
        ("compare", "retention", 0): ("retained", "retained_low", "retained_high", "base"),
        ("source", "attention"): ("layers", "kv_heads", "head_size"),
        ("size",): ("baseline_bytes", "candidate_bytes", "parameters"),
        ("calibration",): ("tokens_sha256", "tokens", "rows_used", "seed"),
    }
    for number in range(len(compare["tasks"])):
        fields = ("baseline", "candidate", "difference", "difference_low", "lost", "gained")
        expected["compare", "tasks", number] = fields
    for number, verdict in enumerate(compare["verdicts"]):
        expected["compare", "verdicts", number] = {"worse", "low", "high", "margin"} & {*verdict}
    for place, fields in expected.items():
        for field in fields:
            assert (*place, field) in seen, (place, field)


def test_figures_are_rounded_as_the_record_has_them(record):
    card = render_card(record)
    values = [value for _, value in leaves(record) if not isinstance(value, str)]
    texts = " ".join(value for _, value in leaves(record) if isinstance(value, str))
    computed = computed_values(record)
    tables = [
        line
        for line in card.splitlines()
        if line.startswith(("|", "![", "- ", "Computed", "instruct, quantized"))
    ]
    for figure in (figure for line in numbers("\n".join(tables)) for figure in line):
        plain = figure.lstrip("×")
        known = plain in texts or plain in CONSTANTS or plain in computed
        assert known or any(is_rounded(value, plain) for value in values), figure


def computed_values(record):
    """Figures that docs/reading-a-card.md says how to compute."""
    size, source = record["size"], record["source"]
    before, after = size["baseline_bytes"], size["candidate_bytes"]
    found = {f"{after / before:.3f}"}
    found |= {f"{8 * count / size['parameters']:.2f}" for count in (before, after)}
    per_token = capacity.kv_bytes_per_token(source["attention"])
    assert per_token == 4 * 2 * 2 * 32 * 2
    found |= {f"{per_token / 1000:.2f}", f"{before / 1e6:.2f}", f"{after / 1e3:.0f}", "2.00"}
    for gpu in capacity.GPUS:
        found |= {str(gpu.gigabytes), *NUMBER.findall(gpu.names)}
        for weights in (before, after):
            tokens = int((0.9 * gpu.gigabytes * 10**9 - weights - 2 * 10**9) // per_token)
            digits = str(tokens)
            found.add(f"{int(digits[:3] + '0' * (len(digits) - 3)):,}")
    checks = len(record["audit"]["checks"])
    found |= {str(checks), str(len(record["audit"]["kept_modules"]))}
    found |= {str(len(record["candidate"]["smoke"]))}
    return found | {*record["audit"]["tensor_parallel"], "1"}


def is_rounded(value, figure):
    """Whether a figure is this value (or a hundred times it) rounded to the digits it has."""
    digits = figure.replace(",", "").rstrip("%")
    if digits.count(".") > 1:
        return False
    mantissa, _, exponent = digits.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    scales = (100,) if figure.endswith("%") else (1, 100)
    return any(abs(value * scale - float(digits)) <= 0.5001 * unit for scale in scales)


def test_the_key_of_the_card_has_its_template(tmp_path):
    recipe = resolved_recipe(tmp_path)
    assert "template" not in stage.key_inputs(recipe, "card")
