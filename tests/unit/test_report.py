"""The HTML report: what is on the page, what is said to be missing, and that nothing is markup."""

import itertools
import re
from html.parser import HTMLParser

import pytest
import report_fixture as fixture

from quantize.records import CompareRecord, Details, MeasureRecord
from quantize.report.page.html import Subject, brief, choices, expected, render_report
from quantize.report.page.shape import problems

VOID = {"meta", "link", "input", "br", "line", "rect", "circle", "path"}


class Page(HTMLParser):
    """Elements in order, the text of each `<data>`, and all text that is shown."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.data, self.open, self.shown = [], [], [], []
        self.feed(text)
        self.close()
        self.text = "".join(self.shown)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "data":
            self.data.append([float(dict(attrs)["value"]), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.shown.append(data)
        if "data" in self.open:
            self.data[-1][1] += data


def page(record=None, details=None, no_details=""):
    found = Subject("m", record or fixture.card(), details, no_details, "record.json")
    return render_report([found])


@pytest.fixture(scope="module")
def full():
    text = page(details=fixture.details())
    return text, Page(text)


def numbers(value, path=""):
    """Every number of a JSON value with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def test_the_fixture_has_the_shape_of_the_records():
    record = fixture.card()
    assert list(problems(record["compare"], CompareRecord, "compare")) == []
    assert list(problems(fixture.details(), Details, "details")) == []
    for side in ("baseline", "candidate"):
        assert list(problems(record[side], MeasureRecord, side)) == []


def test_every_number_of_the_comparison_is_on_the_page(full):
    values = {value for value, _ in full[1].data}
    missing = [path for path, n in numbers(fixture.card()["compare"]) if n not in values]
    assert missing == []


def test_every_number_of_serving_and_health_is_on_the_page(full):
    values = {value for value, _ in full[1].data}
    for side in ("baseline", "candidate"):
        measured = fixture.card()[side]
        of_health = {k: v for k, v in measured["health"].items() if k.startswith("tokens")}
        measured["serving"].pop("prometheus")
        shown = [*numbers(measured["serving"]), *numbers(of_health)]
        assert [path for path, n in shown if n not in values] == []


def test_what_a_person_reads_is_the_value(full):
    """The text of each `<data>` is its value, rounded, in one of the units that are used."""
    scales = (1, 1e-2, 1e3, 1e6, 1e9)
    for value, text in full[1].data:
        bare = text.replace("−", "-").replace(",", "").replace("×", "")
        found = re.match(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", bare)
        assert found, text
        digits = len(found[1] or ".") - 1
        near = 0.5000001 * 10**-digits * (10 ** float(found[2][1:]) if found[2] else 1)
        assert any(abs(float(found[0]) - value / scale) <= near for scale in scales), (
            f"{value} is shown as {text}"
        )


def test_the_elements_are_closed_and_labelled(full):
    _, parsed = full
    assert parsed.open == []
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parsed.elements:
        for name in ("aria-labelledby", "href"):
            if name in attrs and attrs[name].lstrip("#") and not attrs[name].startswith("data:"):
                assert attrs[name].lstrip("#") in ids, attrs
        if attrs.get("role") in ("img", "region"):
            assert attrs["aria-label"].strip(), tag
    tables = sum(tag == "table" for tag, _ in parsed.elements)
    assert tables == sum(tag == "caption" for tag, _ in parsed.elements) > 8
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_asks_for_nothing(full):
    text, parsed = full
    for tag, attrs in parsed.elements:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base"), tag
        assert not [name for name in attrs if name.startswith("on")], attrs
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"#|data:", attrs.get(name, "#")), attrs
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for _, a in parsed.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_strings_from_outside_are_text(full):
    text, parsed = full
    for hostile in (fixture.XSS, fixture.BREAKOUT):
        assert hostile not in text
        assert hostile in parsed.text


STRINGS = [
    fixture.XSS,
    fixture.BREAKOUT,
    "\x00\x07\ud800",
    "{% raw %}",
    "\u202e]]>--><!--",
    "%s{0}",
]


@pytest.mark.parametrize("hostile", STRINGS)
def test_no_string_of_a_record_is_markup(hostile):
    """Every string that the page may show is replaced, names of tasks and devices included."""

    def replaced(value, key=""):
        if isinstance(value, dict):
            return {k: replaced(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [replaced(v, key) for v in value]
        kept = ("schema", "verdict", "kind", "key", "method", "scheme")
        return hostile if isinstance(value, str) and key not in kept else value

    record = fixture.card()
    plain = Page(page(record, fixture.details()))
    of_verdicts = [v["name"] for v in record["compare"]["verdicts"]]
    of_tasks = [t["name"] for t in record["compare"]["tasks"]]
    record = replaced(record)
    for kept, rows in ((of_verdicts, "verdicts"), (of_tasks, "tasks")):
        for name, row in zip(kept, record["compare"][rows], strict=True):
            row["name"] = name
    for side in ("baseline", "candidate"):
        for name, row in zip(("continue", "hostile"), record[side]["smoke"], strict=True):
            row["name"] = name
    for name, row in zip(("continue", "hostile"), record["compare"]["smoke"], strict=True):
        row["name"] = name
    details = fixture.details()
    details["flips"] = replaced(details["flips"])
    text = page(record, details)
    assert text.encode("utf-8")
    tags = [tag for tag, _ in Page(text).elements]
    assert set(tags) <= {tag for tag, _ in plain.elements} | {"g"}
    assert not {"script", "img"} & set(tags)


# --- what is missing is said


def without(*names, **changes):
    record = fixture.card()
    for name in names:
        record["compare"].pop(name)
    record["compare"] |= changes
    return record


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (without("noise"), "Not measured: the baseline was served once."),
        (without("lint"), "Not looked at: this method reads no calibration data"),
        (without(retention=[]), "Not measured: the recipe names no base model"),
        (without(health=[]), "Not measured: the suite asks for no longer generations."),
        (without("aggregate", tasks=[], verdicts=[]), "No task was compared."),
        (without(verdicts=[]), "nothing that was measured has a margin"),
        (
            without("perplexity", "divergence", "own_perplexity", "own_divergence"),
            "No held-out text was compared.",
        ),
        (without(quick=True), "Only the suite’s quick subset was measured."),
    ],
)
def test_an_absent_measurement_is_said(record, says):
    assert says in Page(page(record, fixture.details())).text


def test_a_record_without_details_says_why_there_are_no_flips():
    parsed = Page(page(no_details="the store does not have the comparison"))
    assert parsed.text.count("the store does not have the comparison") == 3
    assert "pony" not in parsed.text
    assert "Perplexity" in parsed.text


def test_a_model_that_was_not_measured_has_a_page():
    record = fixture.card()
    for name in ("compare", "baseline", "candidate"):
        del record[name]
    parsed = Page(page(record))
    assert "was not measured: its recipe asks for no evaluation" in parsed.text
    assert "3.75 MB" in parsed.text


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("non-inferior", "This model is non-inferior to the BF16 original."),
        ("inferior", "This model is inferior to the BF16 original."),
        ("inconclusive", "as good as the BF16 original is inconclusive."),
        ("not comparable", "This model and the BF16 original are not comparable."),
    ],
)
def test_the_verdict_is_the_first_thing_said(verdict, says):
    record = fixture.card()
    record["compare"]["verdicts"][-1]["verdict"] = verdict
    assert says in " ".join(Page(page(record)).text.split())


def test_a_task_where_lower_is_better_is_turned_round():
    record = fixture.card()
    task = record["compare"]["tasks"][0]
    task |= {"higher_is_better": False, "baseline": 8.1, "candidate": 8.4, "difference": 0.3}
    task |= {"difference_low": 0.1, "difference_high": 0.5}
    words = [a["aria-label"] for _, a in Page(page(record)).elements if a.get("role") == "img"]
    assert any("turned round): −0.3, 95% interval −0.5 to −0.1" in sentence for sentence in words)


# --- answers


LISTED = "  -3.092 apple tart\n> -1.594 onion pie\n  -inf leek stew"


def test_an_answer_in_a_few_words():
    assert brief(LISTED) == "“onion pie”"
    assert brief("Sunday\n  afternoon") == "“Sunday afternoon”"
    assert brief("x" * 99) == "“" + "x" * 31 + "…”"
    assert brief(" \n") == "nothing"


def test_the_right_choice_is_named():
    assert expected("2", LISTED) == "2: leek stew"
    for target, answer in (("3", LISTED), ("pony", LISTED), ("1", "pony"), ("²", LISTED)):
        assert expected(target, answer) == target


@pytest.mark.parametrize(
    "plain", ["", "> -1.0 a", "> -1.0 a\nb", "> -1.0 a\n> -2.0 b", "  -1.0 a\n  -2.0 b"]
)
def test_what_lists_no_choices_is_left_alone(plain):
    assert choices(plain) == []


# --- several models


def compared(*records):
    return render_report([Subject(str(n), r, None) for n, r in enumerate(records)])


def test_models_are_compared_on_one_page():
    text = compared(fixture.card(), fixture.worse_card(), fixture.better_card())
    parsed = Page(text)
    assert parsed.open == []
    titles = re.findall("<figcaption>(.*?)<", text)
    assert titles[:4] == [
        "Scores against size",
        "Scores against throughput",
        "Perplexity against size",
        "Perplexity against throughput",
    ]
    assert "Read with care" not in parsed.text
    values = {value for value, _ in parsed.data}
    for record in (fixture.card(), fixture.worse_card(), fixture.better_card()):
        assert record["compare"]["perplexity"]["ratio"] in values
        assert record["size"]["candidate_bytes"] in values


def test_the_frontier_is_what_no_other_model_beats():
    dominated = fixture.card()
    dominated["size"]["candidate_bytes"] = 6_000_000
    dominated["compare"]["perplexity"]["ratio"] = 1.02
    text = compared(fixture.worse_card(), fixture.better_card(), dominated)
    words = [a["aria-label"] for _, a in Page(text).elements if a.get("role") == "img"]
    size = next(sentence for sentence in words if sentence.startswith("Perplexity against size"))
    assert re.findall(r"(\d): [^;]*?(on the frontier)?(?:;|$)", size) == [
        ("0", "on the frontier"),
        ("1", "on the frontier"),
        ("2", ""),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["compare"]["baseline"].update(key="e" * 64), "from the same original"),
        (lambda r: r["candidate"]["perplexity"].update(tokens_sha256="0"), "different held-out"),
        (lambda r: r["candidate"]["server"].update(device="H200"), "on different devices"),
        (lambda r: r["candidate"]["tasks"][0].update(prompts_sha256="0"), "in valley_mc, so its"),
        (lambda r: r["compare"].update(quick=True), "1: a quick run"),
        (lambda r: r.pop("compare"), "1: its quality was not measured."),
    ],
)
def test_what_cannot_be_compared_is_said(change, says):
    other = fixture.worse_card()
    change(other)
    parsed = Page(compared(fixture.card(), other))
    assert "Read with care" in parsed.text
    assert says in parsed.text


# --- colours


def test_contrast_of_text_is_aa_in_both_schemes():
    style = page().split("<style>")[1]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for block in (light, dark.split("}")[0]):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
        for ink in ("ink", "muted", "good", "bad", "open", "candidate"):
            for paper in ("paper", "raised"):
                ratio = contrast(colours[ink], colours[paper])
                assert ratio >= 4.5, f"{ink} on {paper}: {ratio:.2f}"
        # Marks of the pictures: 3:1 is asked of graphics.
        for ink in ("good", "bad", "open", "candidate", "baseline"):
            assert contrast(colours[ink], colours["paper"]) >= 3
            assert contrast(colours[ink], colours["beyond"]) >= 3


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
