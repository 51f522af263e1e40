"""The model card: from artifacts to record to Markdown, with hostile strings on the way."""

import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt
from records_fixture import (
    RECIPE,
    baseline_side,
    candidate_side,
    card_inputs,
    new_store,
    stage_context,
)

from quantize.report.card import differences, front_matter_values, render_card
from quantize.report.markdown import block, code, environment, text
from quantize.report.redact import redact
from quantize.stages import card as stage

MEASURED = ("baseline", "candidate", "compare")


@pytest.fixture
def made(tmp_path):
    """Builds a card; gives its record and its text."""

    def make(before=None, after=None, source=None, recipe=RECIPE, without=(), compressed=None):
        store = new_store(tmp_path)
        inputs = card_inputs(
            store,
            before or baseline_side(),
            after or candidate_side(),
            source=source or {},
            compressed=compressed or {},
        )
        inputs = {role: item for role, item in inputs.items() if role not in without}
        context = stage_context(tmp_path, store, "card", inputs, recipe)
        record = json.loads(json.dumps(stage.build_record(context)))
        return record, render_card(record)

    return make


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def tokens(card):
    """All tokens of the body, inline ones included, as a GFM renderer sees them."""
    body = card.split("\n---\n", 1)[1]
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(body):
        found += [token, *(token.children or [])]
    return found


def with_recipe(**changes):
    return {**RECIPE, **changes}


# --- content


def test_card_of_a_local_checkpoint(made):
    record, card = made()
    values = front(card)
    assert [entry["name"] for entry in values.pop("model-index")] == ["tiny-llama-awq"]
    assert values == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["awq", "w4a16_asym", "compressed-tensors", "vllm", "quantized"],
        "quantized_by": "quantize",
    }
    ratio = record["compare"]["perplexity"]["ratio"]
    assert f"perplexity ×{ratio:.4f} that of BF16 on valley.jsonl (95% interval" in card
    assert "of BF16's score kept on average over 2 tasks (95% interval" in card
    assert "weights ×0.350 the original's size." in card
    assert "vllm serve ./tiny-llama-awq \\\n" in card
    assert "--max-model-len 1024" in card
    assert "15,321" in card
    assert "e" * 64 in card
    assert "- Linear layers: 28 quantized, 1 kept as they were: `lm_head`" in card
    assert "llmcompressor 0.14.0.1" in card
    assert "Not measured" not in card
    assert "overrides" not in card
    assert "\n\n\n" not in card.replace("Recipe", "")


def test_a_mixed_recipe_is_on_the_card_as_it_was_filled_in(made):
    overrides = [
        {"modules": ["re:.*down_proj$"], "scheme": "W8A16"},
        {"modules": ["re:.*o_proj$"], "scheme": "FP8_DYNAMIC"},
        {"modules": ["re:.*[qkv]_proj$"], "scheme": "W8A16", "group_size": "channel"},
    ]
    quantize = {"method": "awq", "group_size": "channel", "overrides": overrides}
    record, card = made(recipe=with_recipe(quantize=quantize | {"kv_cache": "fp8"}))
    overrides[0]["group_size"] = 128
    assert record["recipe"]["quantize"]["overrides"] == overrides
    assert (
        "AWQ, W4A16_ASYM, a scale for each output channel, some modules W8A16 or FP8_DYNAMIC, "
        "scales for an FP8 KV cache" in card
    )


NOTE = "quantized by llm-compressor's oneshot: not verified on PhiForCausalLM"


@pytest.mark.parametrize(
    ("compressed", "engine"),
    [
        ({}, "quantize's own, a decoder layer at a time"),
        ({"engine": "llmcompressor"}, "llm-compressor's oneshot"),
        ({"engine": "llmcompressor", "engine_note": NOTE}, NOTE),
        ({"engine": "gptqmodel"}, "GPTQModel, the successor of AutoGPTQ"),
        (
            {"engine": "elsewhere", "made_by": "gptq, gptqmodel:7.7.0"},
            "none of ours: quantized elsewhere, and taken as it is "
            "(its config says: gptq, gptqmodel:7.7.0)",
        ),
    ],
)
def test_the_engine_that_ran_is_on_the_card(made, compressed, engine):
    card = made(compressed=compressed)[1]
    assert f"\n- Engine: {engine}\n" in card
    assert "Rounded to nearest" not in card


def test_tags_and_packages_are_those_of_the_format(made):
    record, card = made()
    assert "It needs `compressed-tensors`." in card
    changed = json.loads(json.dumps(record))
    changed["recipe"]["quantize"]["format"] = "gptq"
    card = render_card(changed)
    assert "It needs `optimum` and `gptqmodel`." in card
    assert "\n- gptq\n" in card
    assert "compressed-tensors" not in card.split("---")[1]


def test_modules_that_were_rounded_to_nearest_are_limits(made):
    experts = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in (3, 5)]
    card = made(compressed={"unvisited": experts, "not_factorised": ["model.layers.1.o_proj"]})[1]
    limits = card.split("## Limits")[1]
    assert f"2 module(s) that no calibration token reached, `{experts[0]}` the first" in limits
    assert "1 module(s) that GPTQ found no factorisation for, `model.layers.1.o_proj`" in limits


def test_card_is_a_function_of_its_record_alone(made):
    record, card = made()
    assert render_card(record) == card


def test_a_number_changed_by_hand_is_found(made):
    record, card = made()
    assert differences(card, record) == []
    ratio = f"{record['compare']['perplexity']['ratio']:.4f}"
    (found,) = differences(card.replace(f"| ×{ratio} |", "| ×0.9000 |"), record)
    assert "×0.9000" in found
    assert ratio in found
    changed = json.loads(json.dumps(record))
    changed["compare"]["tasks"][0]["candidate"] += 0.1
    assert differences(card, changed)
    assert differences(card + "\nMore.", record)


def test_card_of_a_hub_checkpoint_names_its_base(made):
    source = {"kind": "hub", "folder": "model", "repo": "acme/chat-7b", "commit": "c" * 40}
    recipe = with_recipe(
        model={"source": "acme/chat-7b"}, publish={"hub": {"repo": "acme/chat-7b-awq"}}
    )
    record, card = made(source=source, recipe=recipe)
    assert front(card)["base_model"] == "acme/chat-7b"
    assert front(card)["base_model_relation"] == "quantized"
    assert record["target"] == "acme/chat-7b-awq"
    assert "vllm serve acme/chat-7b-awq \\\n" in card
    assert 'from_pretrained("acme/chat-7b-awq")' in card
    assert "c" * 40 in card


@pytest.mark.parametrize(
    ("adapter", "bases"),
    [
        ({"source": "acme/lora", "commit": "d" * 40}, ["acme/chat-7b", "acme/lora"]),
        ({"source": "/home/someone/lora"}, None),
    ],
)
def test_a_merge_names_its_parts_only_if_anyone_can_find_them(made, adapter, bases):
    source = {"kind": "merged", "repo": "acme/chat-7b", "commit": "c" * 40, "adapter": adapter}
    recipe = with_recipe(model={"source": "acme/chat-7b", "adapter": adapter["source"]})
    _, card = made(source=source, recipe=recipe)
    assert front(card).get("base_model") == bases
    assert f"the LoRA adapter `{'acme/lora' if bases else 'lora'}`" in card


def test_every_number_of_the_results_table_is_the_records(made):
    record, card = made()
    section = card.split("## Results against BF16")[1].split("KL divergence is a lower bound")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [cell for row in rows for cell in row.split("|")[2:-1]]
    shown = re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e-\d+)?%?", " ".join(cells))
    assert len(shown) > 30
    numbers = list(_walk(record["compare"]))
    for number in shown:
        assert any(_is_shown(value, number) for value in numbers), number
    # And the other way round: what was compared is in the table.
    compare = record["compare"]
    perplexity, divergence = compare["perplexity"], compare["divergence"]
    expected = [perplexity[key] for key in ("baseline", "candidate", "ratio", "ratio_low")]
    expected += [divergence["mean"], divergence["p99"], divergence["top1_agreement"]]
    for task in compare["tasks"]:
        expected += [task[key] for key in ("baseline", "candidate", "difference", "lost")]
    for value in expected:
        assert any(_is_shown(value, number) for number in shown), value


def _walk(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _walk(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _is_shown(value, number):
    digits = number.replace(",", "").rstrip("%")
    scale = 100 if number.endswith("%") else 1
    mantissa, _, exponent = digits.partition("e")
    decimals = len(mantissa.partition(".")[2])
    half_unit = 0.5 * 10.0 ** (int(exponent or 0) - decimals)
    return abs(value * scale - float(digits)) <= half_unit * 1.0001


def test_answers_stand_side_by_side_once(made):
    before, after = baseline_side(), candidate_side()
    for side, name in ((before, "four"), (after, "five")):
        side.answers = {**side.answers, "count-2": f"One, two, {name}.\nThat | is all."}
    _, card = made(before, after)
    table = card.split("Answers side by side")[1].split("</details>")[0]
    assert "| One, two, three. | One, two, four. |" in table
    assert r"| One, two, four.<br>That \| is all. | One, two, five.<br>That \| is all. |" in table


def test_a_failed_margin_and_check_are_on_the_card(made):
    after = candidate_side(noise=3)
    after.failing = frozenset({"count"})
    record, card = made(after=after)
    verdicts = {verdict["name"]: verdict for verdict in record["compare"]["verdicts"]}
    assert verdicts["model"]["verdict"] == "inferior"
    assert "### Verdict: inferior" in card
    assert re.search(r"\| Perplexity \| \+[\d.]+ \| .* \| inferior", card)
    assert "- **A smoke check failed**: count: not empty" in card


def test_a_card_without_evaluation_says_so(made):
    recipe = {key: value for key, value in RECIPE.items() if key != "evaluate"}
    record, card = made(recipe=recipe, without=(*MEASURED, "calibrate"))
    assert "compare" not in record
    assert "**What this cost in quality was not measured.** The recipe asks for no eval" in card
    assert "## Results" not in card
    assert "## Serving" not in card
    assert "the method needs no data" in card
    assert "weights ×0.350 the original's size." in card


def test_weights_that_were_unpacked_to_be_served(made):
    record, plain = made()
    assert "unpacked" not in plain
    record["candidate"]["unpacked"] = "no kernel | here"
    card = render_card(record)
    results, use = card.partition("## How to use it")[::2]
    assert r"This model answered with its weights unpacked to BF16: no kernel \| here." in results
    assert r"The packed weights were not served as they are (no kernel \| here)" in use
    assert "\n\n\n" not in card.replace("Recipe", "")


def test_a_candidate_that_was_not_served(made):
    after = candidate_side()
    after.served = False
    after.not_measured = [{"what": "everything", "why": "no FP8 here"}]
    _, card = made(after=after)
    assert "**What this cost in quality was not measured.** The limits below say why." in card
    assert "- **Not measured**: everything (candidate), because: no FP8 here" in card
    assert "| Output tokens/s | 123.4 |  |" in card


# --- hostile strings

HOSTILE = [
    "](javascript:alert(1))",
    "[x](http://evil.example)",
    "{{7*7}}{% raw %}",
    "a\n---\nlicense: mit\n---\nb",
    "<script>alert(1)</script>",
    "`<img src=x onerror=alert(1)>`",
    "a\n```\n</details><b>out</b>\n```",
    "a | b\n|---|\n| c |",
    "![i](http://evil.example/i.png) **b** _i_ ~~s~~ &lt;b&gt;",
    "\u202egnp.exe\x00\x1b[31m",
]


@pytest.mark.parametrize("evil", HOSTILE)
def test_strings_from_outside_stay_strings(made, evil):
    before, after = baseline_side(), candidate_side()
    before.answers = after.answers = {"capital": evil, evil: evil}
    before.not_measured = [{"what": evil, "why": evil}]
    record, plain = made(before, after, source={"license": evil, "languages": [evil, "en"]})
    record["source_name"] = record["adapter_name"] = record["fine_tuned_from"] = evil
    record["recipe"]["name"] = record["target"] = evil
    record["base_models"] = [evil]
    record["source"]["commit"] = record["source"]["license"] = evil
    record["recipe"]["quantize"]["ignore"] = [evil]
    record["recipe"]["serve"]["extra_args"] = [evil]
    record["baseline"]["suite"] = record["baseline"]["perplexity"]["text"] = evil
    record["baseline"]["server"]["device"] = record["candidate"]["server"]["version"] = evil
    record["calibration"]["source"] = record["calibration"]["data_digest"] = evil
    record["compare"]["tasks"][0]["name"] = record["compare"]["gates"][0]["name"] = evil
    record["compare"]["smoke_failed"] = [evil]
    record["versions"]["compress"][evil] = evil
    card = render_card(record)

    values = front(card)
    assert "license" not in values
    assert "base_model" not in values
    assert values["language"] == ["en"]
    found, expected = tokens(card), tokens(plain)
    html = {"<details>", "</details>", "<summary>", "</summary>", "<br>"}
    for token in found:
        assert token.type not in ("link_open", "s_open", "em_open"), token
        if token.type == "image":
            assert re.fullmatch(r"quantize/plots/[a-z-]+\.png", token.attrs["src"])
        if token.type in ("html_block", "html_inline"):
            assert set(re.findall(r"<[^>]*>", token.content)) <= html, token.content
        assert not (token.type == "text" and "\u202e" in token.content)
    headings = [token.content for token in found if token.type == "inline" and token.level == 1]
    assert len([h for h in headings if h == "Limits"]) == 1
    sections = [sum(token.type == "heading_open" for token in side) for side in (found, expected)]
    assert sections[0] == sections[1]
    tables = [sum(token.type == "table_open" for token in side) for side in (found, expected)]
    assert tables[0] == tables[1]


def test_templates_print_no_string_that_passed_no_filter():
    template = environment().from_string("{{ name }}")
    with pytest.raises(TypeError, match="without a filter"):
        template.render(name="<b>")
    assert template.render(name=3) == "3"


def test_front_matter_takes_only_what_the_hub_takes(made):
    record, _ = made()
    record["source"] |= {"license": "mit\nx: y", "languages": ["en", "english", "zh-Hans"]}
    values = front_matter_values(record)
    assert "license" not in values
    assert values["language"] == ["en", "zh-Hans"]


def test_filters():
    assert text("a_b *c* <d>\n e") == r"a_b \*c\* \<d\> e"
    assert text("_a_ x|y http://e.example") == r"\_a\_ x\|y http\://e.example"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
    assert block("a\n```\nb\n") == "````\na\n```\nb\n````"


# --- places and tokens


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/home/someone/models/instruct", "instruct"),
        ("/home/someone/my models/instruct/", "instruct"),
        ("~/models/instruct", "instruct"),
        ("~someone/models/instruct", "instruct"),
        ("file:///home/someone/text.jsonl", "text.jsonl"),
        (r"C:\Users\someone\text.jsonl", "text.jsonl"),
        ("--chat-template=/home/someone/t.jinja", "--chat-template=t.jinja"),
        ("cannot read '/home/someone/x.json': gone", "cannot read 'x.json': gone"),
        ("/home/someone/x is missing; see /home/someone/y", "x is missing; see y"),
        ("token hf_abcdefghijklmnop was refused", "token hf_*** was refused"),
        ("https://huggingface.co/acme/chat", "https://huggingface.co/acme/chat"),
        ("acme/chat-7b", "acme/chat-7b"),
        ("../models/instruct", "../models/instruct"),
        ("12 / 13 tokens/s, about ~5", "12 / 13 tokens/s, about ~5"),
        (r"re:.*\.mlp\.\d+", r"re:.*\.mlp\.\d+"),
        ("/", "/"),
    ],
)
def test_paths_become_base_names(before, after):
    assert redact(before) == after
    assert redact(redact(before)) == after


def test_no_local_path_and_no_token_anywhere(made):
    home, token = "/home/someone/secret/", "hf_" + "a" * 34
    before, after = baseline_side(), candidate_side()
    before.not_measured = [{"what": "x", "why": f"{home}log.txt says: {token}"}]
    recipe = with_recipe(
        model={"source": f"{home}instruct", "base": "~someone/base"},
        calibration={"source": f"{home}data.jsonl"},
        evaluate={"suite": f"{home}suite.yaml"},
        serve={"extra_args": ["--chat-template", f"{home}t.jinja", f"--hf-token={token}"]},
        publish={"folder": f"{home}out"},
        environments={"vllm": {"python": f"{home}bin/python"}},
    )
    record, card = made(before, after, source={"folder": f"{home}instruct"}, recipe=recipe)
    for content in (json.dumps(record), card):
        assert "someone" not in content
        assert "secret" not in content
        assert token not in content
    assert "log.txt says: hf\\_\\*\\*\\*" in card
    assert record["source_name"] == record["recipe"]["model"]["source"] == "instruct"
    assert record["fine_tuned_from"] == "base"
    assert "publish" not in record["recipe"]
    assert "environments" not in record["recipe"]


def test_what_was_answered_keeps_its_slashes(made):
    before, after = baseline_side(), candidate_side()
    before.answers = after.answers = {"path": "It is /usr/bin/python."}
    record, card = made(before, after)
    assert record["candidate"]["smoke"][0]["answer"] == "It is /usr/bin/python."
    assert "It is /usr/bin/python." in card


def test_the_key_has_what_the_card_says_and_no_more(tmp_path):
    def key(recipe, name):
        folder = tmp_path / name
        folder.mkdir()
        return stage.key_inputs(stage_context(folder, None, "card", {}, recipe).resolved, "card")

    plain = key(RECIPE, "a")
    assert key(with_recipe(publish={"folder": "elsewhere"}), "b") == plain
    assert key(with_recipe(publish={"hub": {"repo": "acme/x"}}), "c") != plain
    assert key(with_recipe(serve={"max_num_seqs": 8}), "d") != plain
