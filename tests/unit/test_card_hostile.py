"""Whatever strings a record holds, a card made from it has the links, pictures and parts it has."""

import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from records_fixture import baseline_side, candidate_side, card_inputs, new_store, stage_context

from quantize.report.card import render_card
from quantize.stages import card as stage

OURS = {
    *(("schema",), ("plots",), ("compare", "health"), ("compare", "schema")),
    *(("baseline", "schema"), ("candidate", "schema"), ("artifacts",)),
}
"""Words of this program, by which it looks things up: nobody else writes them."""

PIECES = [
    *("[", "](", ")", "![", "<", ">", "</", "<!--", "-->", "`", "```", "~~~", "*", "**", "_", "~~"),
    *("|", "\\", "\n", "\r", "\n\n", "\t", "    ", "#", "# ", "\n# ", "\n---\n", "\n===\n", "- "),
    *("1. ", "> ", "&lt;", "&#60;", "&", ";", ":", "//", "http://", "https://e.example", "www.e.x"),
    *(
        "javascript:",
        "mailto:a@b.example",
        "a@b.example",
        "{{ 7*7 }}",
        "{% raw %}",
        "$",
        "$$",
        "\\[",
    ),
    *("\u202e", "\u2028", "\x00", "\x1b[31m", "\ud800", "</details>", "<img src=x>", "<script>"),
    *("license: mit", "---", "...", "!!python/object:x", "\n  - x: y", "'", '"', "[^1]", "[^1]: x"),
    *("a", "b c", "é", "0", "@someone", "#12"),
]
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)
FRONT = {
    *("license", "language", "library_name", "pipeline_tag", "tags", "quantized_by", "model-index"),
    *("base_model", "base_model_relation", "license_name", "extra_gated_prompt", "license_link"),
}
HTML = {"<details>", "</details>", "<summary>", "</summary>", "<br>"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    store = new_store(folder)
    before, after = baseline_side(), candidate_side()
    source = {"licence_terms": {"license_name": "x", "extra_gated_prompt": "x"}}
    inputs = card_inputs(store, before, after, source=source)
    made = stage.build_record(stage_context(folder, store, "card", inputs))
    made["adapter_name"] = made["fine_tuned_from"] = made["target"] = "x"
    made["source"]["commit"] = "x"
    made["compress"] |= {"unvisited": ["x"], "not_factorised": ["x"], "engine_note": "x"}
    made["compare"]["alarms"] = made["compare"]["smoke_failed"] = ["x"]
    made["compare"]["not_measured"] = [{"what": "x", "why": "x"}]
    made["compare"]["lint"] = {"findings": [{"kind": "overlap", "message": "x", "rows": [1]}]}
    made["recipe"]["serve"]["extra_args"] = ["x"]
    made["candidate"]["tasks"][0]["dataset"] = {"path": "x", "config": "x", "split": "x"}
    return made


def replaced(value, text, path=()):
    """The record with `text` for every string that is not ours, and as the name of a tool."""
    if path in OURS:
        return value
    if isinstance(value, dict):
        found = {key: replaced(item, text, (*path, key)) for key, item in value.items()}
        return {**found, text: text} if path[:1] == ("versions",) and len(path) == 2 else found
    if isinstance(value, list):
        return [replaced(item, text, (*path, "[]")[:2]) for item in value]
    return text if isinstance(value, str) else value


def parts(card):
    """Headings, tables, lists and pictures, as a reader of GitHub's Markdown sees them."""
    body = card.split("\n---\n", 1)[1]
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(body):
        found += [token, *(token.children or [])]
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=HOSTILE)
def test_no_string_becomes_markup(record, text):
    plain, card = (render_card(replaced(copy.deepcopy(record), t)) for t in ("x", text))
    found, expected = parts(card), parts(plain)
    for token in found:
        assert token.type not in ("link_open", "s_open", "em_open", "code_block"), token
        if token.type == "image":
            assert re.fullmatch(r"quantize/plots/[a-z-]+\.png", token.attrs["src"])
        if token.type in ("html_block", "html_inline"):
            assert set(re.findall(r"<[^>]*>", token.content)) <= HTML, token.content
        if token.type == "text":
            assert not {"\u202e", "\u2028", "\x00", "\x1b"} & set(token.content)
    for kind in ("heading_open", "table_open", "image", "fence", "hr", "html_block", "th_open"):
        counts = [sum(token.type == kind for token in side) for side in (found, expected)]
        assert counts[0] == counts[1], kind
    strong = {t.content for t in found if t.type == "strong_open"}
    assert strong <= {""}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=HOSTILE)
def test_no_string_becomes_metadata(record, text):
    card = render_card(replaced(copy.deepcopy(record), text))
    values = yaml.safe_load(card.split("\n---\n", 1)[0])
    assert set(values) <= FRONT
    assert "base_model" not in values or values["base_model"] == text
    data = ModelCard(card).data  # finds the same end of the front matter
    assert {key for key in data.to_dict() if key != "model_name"} <= FRONT
    assert data.tags[-1] == "quantized"
    assert len(data.eval_results) == 3
