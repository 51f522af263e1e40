"""The calibration lint: what is planted is found, what is not there is not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.records import Lint
from quantize.report.paired.lint import NAMED_ROWS, language, lint
from quantize.report.paired.overlap import RowIndex, has_marker

SYSTEM = (
    "You are a careful and friendly assistant who answers every question about the valley as well "
    "as you can and says so when you do not know."
)
ENGLISH = "The ferry at the weir carries {} sacks of barley to the mill before noon on most days."
GERMAN = "Die Fähre am Wehr bringt an den meisten Tagen {} Säcke Gerste vor dem Mittag zur Mühle."


def words(generator: random.Random, count: int) -> list[str]:
    """Made-up words, so many of them that no two texts share a run by chance."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(generator.choices(letters, k=generator.randint(3, 9))) for _ in range(count)]


def texts(generator: random.Random, count: int, low: int, high: int) -> list[str]:
    return [" ".join(words(generator, generator.randint(low, high))) for _ in range(count)]


def disguised(generator: random.Random, text: str) -> str:
    """Other case, punctuation and white space: the same words."""
    parts = []
    for word in text.split():
        shown = generator.choice([str.upper, str.title, str.lower])(word)
        parts.append(shown + generator.choice(["", ",", ".", "!", " —"]))
        parts.append(generator.choice([" ", "  ", "\n", "\t"]))
    return "".join(parts)


def chat(question: str, system: str = SYSTEM) -> str:
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def found(rows: Sequence[str], documents: Sequence[str]) -> list[tuple[int, int]]:
    return [(one.row, one.document) for one in RowIndex(rows).overlaps(documents)]


seeds = st.integers(0, 2**32).map(random.Random)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(8, 40), st.integers(0, 200), st.booleans())
def test_a_planted_document_is_found_in_its_row(
    generator: random.Random, size: int, around: int, template: bool
) -> None:
    rows = texts(generator, 20, 10, 120)
    documents = texts(generator, 15, 8, 200)
    row, document = generator.randrange(len(rows)), generator.randrange(len(documents))
    documents[document] = " ".join(words(generator, size))
    before, after = words(generator, around), words(generator, around)
    planted = disguised(generator, documents[document])
    rows[row] = f"{' '.join(before)} {planted} {' '.join(after)}"
    if template:
        rows, documents = [chat(text) for text in rows], [chat(text) for text in documents]
    assert found(rows, documents) == [(row, document)]


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(13, 60))
def test_shuffled_words_are_not_overlap(generator: random.Random, size: int) -> None:
    document = words(generator, size)
    other = document.copy()
    while other == document:
        generator.shuffle(other)
    rows = [*texts(generator, 10, 10, 60), " ".join(sorted(document)), " ".join(document[::-1])]
    assert found(rows, [" ".join(document), *texts(generator, 10, 10, 60)]) == []


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 40), st.integers(2, 40))
def test_unrelated_texts_share_nothing_but_their_boilerplate(
    generator: random.Random, rows: int, documents: int
) -> None:
    """A system prompt on both sides is no overlap, few rows or many."""
    asked = [chat(text) for text in texts(generator, documents, 1, 40)]
    asked += [chat(text) for text in texts(generator, 5, 1, 40)]
    assert found([chat(text) for text in texts(generator, rows, 1, 40)], asked) == []


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_more_documents_take_no_finding_away(generator: random.Random) -> None:
    rows = texts(generator, 30, 10, 60)
    documents = [rows[3], rows[7].upper(), *texts(generator, 10, 10, 60)]
    assert {row for row, _ in found(rows, documents)} == {3, 7}
    more = [*documents, *texts(generator, 100, 5, 100)]
    assert {row for row, _ in found(rows, more)} == {3, 7}


def test_a_question_is_found_behind_few_shot_examples_that_all_prompts_have() -> None:
    generator = random.Random(0)
    shots = "\n\n".join(texts(generator, 5, 30, 50))
    questions = texts(generator, 50, 15, 40)
    rows = [*texts(generator, 20, 30, 60), chat(questions[4]), chat(shots)]
    assert found(rows, [f"{shots}\n\n{question}" for question in questions]) == [(20, 4)]


def test_few_shot_examples_of_one_subject_are_no_overlap() -> None:
    generator = random.Random(1)
    shots = "\n\n".join(texts(generator, 5, 30, 50))
    prompts = [f"{shots}\n\n{question}" for question in texts(generator, 40, 15, 30)]
    others = texts(generator, 460, 15, 30)
    assert found([shots, *texts(generator, 20, 30, 60)], prompts + others) == []


def test_short_documents_are_looked_for_as_a_whole() -> None:
    generator = random.Random(2)
    documents = texts(generator, 10, 30, 40)
    rows = texts(generator, 10, 30, 40)
    ten, seven = words(generator, 10), words(generator, 7)
    documents += [" ".join(ten), " ".join(seven)]
    rows += [" ".join([*words(generator, 20), *ten]), " ".join([*words(generator, 20), *seven])]
    rows += [" ".join([*words(generator, 20), *ten[:9], *words(generator, 5)])]
    assert found(rows, documents) == [(10, 10)]


def test_a_stock_phrase_is_no_overlap_and_half_of_a_text_is() -> None:
    generator = random.Random(3)
    document = words(generator, 60)
    phrase = " ".join([*words(generator, 40), *document[5:19], *words(generator, 40)])
    half = " ".join([*words(generator, 40), *document[20:50], *words(generator, 40)])
    assert found([phrase, half], [" ".join(document)]) == [(1, 0)]


def test_fifty_words_of_a_long_text_are_overlap_however_long_both_are() -> None:
    generator = random.Random(4)
    document = words(generator, 2000)
    rows = []
    for size in (45, 55):
        rows += [" ".join([*words(generator, 800), *document[:size], *words(generator, 800)])]
    assert found(rows, [" ".join(document)]) == [(1, 0)]


def test_the_largest_overlap_of_a_row_is_told() -> None:
    generator = random.Random(5)
    small, large = " ".join(words(generator, 15)), " ".join(words(generator, 30))
    (only,) = RowIndex([f"{small} {large}"]).overlaps([small, large])
    assert (only.document, only.shared) == (1, 30)
    assert only.phrase == " ".join(large.split()[:13])


def test_scripts_without_spaces_and_with_combining_marks() -> None:
    chinese = "渡船每天中午之前把两袋大麦从河堰运到磨坊去"
    hindi = "नाव हर दिन दोपहर से पहले जौ की दो बोरियाँ बाँध से चक्की तक ले जाती है"
    rows = [f"他说：{chinese[:9]}，{chinese[9:]}。", f"{hindi} ।", "渡船"]
    assert found(rows, [chinese, hindi]) == [(0, 0), (1, 1)]
    assert found([chinese[::-1], " ".join(hindi.split()[::-1])], [chinese, hindi]) == []


def test_no_documents_and_documents_without_words() -> None:
    assert found(["one two three"], []) == []
    assert found(["", "?!"], ["", "..."]) == []
    assert found(["?!"], [" ".join(words(random.Random(6), 20))]) == []


@pytest.mark.parametrize(
    "text",
    [
        "<|user|>Hello<|end|>",
        "<|im_start|>user\nHello<|im_end|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        "<s>[INST] Hello [/INST]",
        "<start_of_turn>user\nHello<end_of_turn>",
        "<｜User｜>Hello",
    ],
)
def test_markers_of_known_templates(text: str) -> None:
    assert has_marker(text)
    assert not has_marker("Hello, a < b and c > d | e")


# Profiles


def checked(
    rows: Sequence[str],
    documents: Mapping[str, Sequence[str]],
    *,
    templated: bool = False,
    **statistics: Any,
) -> Lint:
    """`rows` as every third row of a source; a token a word."""
    counts = [len(text.split()) for text in rows]
    calibration = {
        "sequence_length": max(counts),
        "packing": False,
        "sequences": len(rows),
        "tokens": sum(counts),
        "rows_by_kind": {"text": len(rows)},
        "chat_template_applied": False,
    } | statistics
    lines = [
        {"row": 3 * place + 1, "text": text, "tokens": count}
        for place, (text, count) in enumerate(zip(rows, counts, strict=True))
    ]
    return lint(lines, calibration, documents, templated)


def kinds(result: Lint) -> list[str]:
    return [finding["kind"] for finding in result["findings"]]


def english(count: int) -> list[str]:
    return [f"{ENGLISH.format(n)} {' '.join(words(random.Random(n), 3))}" for n in range(count)]


def german(count: int) -> list[str]:
    return [GERMAN.format(n) for n in range(count)]


def test_nothing_to_say() -> None:
    result = checked(english(20), {"asks": english(80)[50:], "reads": english(99)[90:]})
    assert result["findings"] == []
    assert result["rows"] == 20
    assert result["languages"] == result["evaluation_languages"] == {"en": 1.0}
    assert result["tokens_median"] == 21
    assert result["evaluation_tokens_median"] == pytest.approx(21, abs=1)
    assert result["overlapping_rows"] == 0
    assert result["padding_share"] == 0


def test_overlapping_rows_are_named_as_in_the_source_and_counted_once() -> None:
    rows = texts(random.Random(7), 20, 20, 30)
    documents = texts(random.Random(8), 9, 20, 30)
    result = checked(rows, {"a": [*documents, rows[4], rows[6]], "b": [rows[6].title()]})
    assert kinds(result) == ["overlap", "overlap"]
    assert [finding["rows"] for finding in result["findings"]] == [[13, 19], [19]]
    assert "text of a (row " in result["findings"][0]["message"]
    assert result["overlapping_rows"] == 2


def test_many_rows_are_named_only_in_part() -> None:
    rows = texts(random.Random(9), 30, 20, 30)
    result = checked(rows, {"all": rows})
    assert result["overlapping_rows"] == 30
    assert len(result["findings"][0]["rows"]) == NAMED_ROWS


def test_a_language_that_is_asked_in_and_not_calibrated_and_the_other_way_round() -> None:
    asked = checked(english(20), {"asks": english(80)[50:] + german(10)})
    assert kinds(asked) == ["language"]
    assert "25% of the evaluation's texts are in 'de'" in asked["findings"][0]["message"]
    calibrated = checked(english(15) + german(5), {"asks": english(80)[50:]})
    assert kinds(calibrated) == ["language"]
    assert calibrated["findings"][0]["rows"] == [46, 49, 52, 55, 58]
    assert calibrated["languages"] == {"en": 0.75, "de": 0.25}
    both = checked(english(15) + german(5), {"asks": english(80)[50:] + german(30)[20:]})
    assert "language" not in kinds(both)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("yes", "unknown"),
        ("12 + 30 = 42; 17 * 3 = 51; 99 / 3 = 33", "unknown"),
        ("<|im_start|>assistant\n<|im_end|><|im_start|>user\n<|im_end|>", "unknown"),
        (chat(GERMAN, "Antworte kurz."), "de"),
        (" ".join(words(random.Random(13), 60)), "unknown"),
        (ENGLISH.upper(), "en"),
        ("今天天气很好，我们打算去公园里散步，然后回家吃饭。", "zh"),
    ],
)
def test_language_of_a_text_only_where_one_can_be_sure(text: str, code: str) -> None:
    assert language(text) == code


def test_evaluation_texts_far_longer_than_what_is_calibrated() -> None:
    rows, long = texts(random.Random(10), 20, 20, 30), texts(random.Random(11), 20, 300, 400)
    assert kinds(checked(rows, {"reads": long})) == ["length"]
    assert kinds(checked(long, {"asks": rows})) == []
    # Packed rows reach as far as a sequence does; a cut row reaches no farther.
    assert kinds(checked(rows, {"reads": long}, packing=True, sequence_length=200)) == []
    cut = texts(random.Random(12), 20, 300, 400)
    assert kinds(checked(cut, {"reads": long}, sequence_length=32)) == ["length"]


def test_rows_without_the_template_through_which_the_tasks_ask() -> None:
    rows, asked = english(20), {"asks": [chat(text) for text in english(80)[50:]]}
    plain = checked(rows, asked, templated=True)
    assert kinds(plain) == ["template"]
    assert plain["findings"][0]["rows"][:3] == [1, 4, 7]
    assert kinds(checked(rows, asked, templated=False)) == []
    some = {"messages": 5, "text": 15}
    assert kinds(checked(rows, asked, templated=True, rows_by_kind=some)) == []
    # Rendered by hand, in `text`.
    assert kinds(checked([chat(text) for text in rows], asked, templated=True)) == []


def test_room_that_stays_empty() -> None:
    rows, asked = english(20), {"asks": english(80)[50:]}
    result = checked(rows, asked, sequence_length=2000)
    assert kinds(result) == ["padding"]
    assert result["padding_share"] == pytest.approx(1 - 20 * 21 / 40_000)
    assert "40,000 tokens and hold 420" in result["findings"][0]["message"]
    packed = checked(rows, asked, sequence_length=2000, packing=True)
    assert packed["findings"] == [] and packed["padding_share"] == 0


def test_without_documents_only_the_rows_are_described() -> None:
    result = checked(english(5), {})
    assert "evaluation_tokens_median" not in result
    assert result["evaluation_languages"] == {} and result["findings"] == []


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no calibration rows"):
        checked_rows: list[Mapping[str, Any]] = []
        lint(checked_rows, {}, {}, False)
