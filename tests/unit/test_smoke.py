"""Smoke prompts: what is sent, and what is seen in the answers."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_server import Model

from quantize.errors import SourceError
from quantize.measure.client import Answer, Client
from quantize.measure.smoke import REPEATS, checks, measure, repetition
from quantize.records import Smoke
from quantize.suite import Prompt, Prompts


def prompt(kind: str = "completion", **keys: Any) -> Prompt:
    if not keys.get("messages"):
        keys = {"prompt": "say it"} | keys
    return Prompt.model_validate_json(
        json.dumps({"name": "p", "kind": kind, **keys})  # JSON's lists become tuples
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def run(client: Client, *prompts: Prompt, special: tuple[str, ...] = ()) -> list[Smoke]:
    file = Prompts(version=1, name="f", prompts=prompts)
    return measure(client, file, special, lambda done, total: None)


# --- one answer -------------------------------------------------------------------------------


def answer(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, finish_reason, 3, 5, 0.1)


@pytest.mark.parametrize(
    ("check", "text", "passed"),
    [
        ("not_empty", "a", True),
        ("not_empty", "", False),
        ("not_empty", " \n\t", False),
        ("valid_utf8", "grün 日本", True),
        ("valid_utf8", "gr\ufffdn", False),
        ("no_repetition", "one two three", True),
        ("no_repetition", "no " * (REPEATS - 1), True),
        ("no_repetition", "no " * REPEATS, False),
        ("no_repetition", "!" * 64, False),
        ("no_template_echo", "hello", True),
        ("no_template_echo", "hello<|im_end|>", False),
        ("finishes", "a", True),
    ],
)
def test_checks(check: str, text: str, passed: bool) -> None:
    (found,) = checks(prompt(checks=[check]), answer(text), ("<|im_end|>", "<s>"))
    assert found["name"] == check
    assert found["passed"] == passed
    assert bool(found["detail"]) != passed


def test_an_answer_that_does_not_finish() -> None:
    (found,) = checks(prompt(checks=["finishes"]), answer("a", "length"), ())
    assert (found["passed"], found["detail"]) == (False, "it ended by length")


def test_what_an_answer_must_hold() -> None:
    wanted = prompt(checks=["not_empty"], contains=["Paris", "SEINE"])
    found = checks(wanted, answer("paris lies on it"), ())
    assert [(check["name"], check["passed"], check["detail"]) for check in found] == [
        ("not_empty", True, ""),
        ("contains Paris", True, ""),
        ("contains SEINE", False, "no 'SEINE' in the answer"),
    ]


def test_every_echoed_token_is_named() -> None:
    text = "<s>hello</s>"
    (found,) = checks(prompt(checks=["no_template_echo"]), answer(text), ("<s>", "</s>", "<unk>"))
    assert found["detail"] == "special tokens in the answer: <s>, </s>"


# --- repetition -------------------------------------------------------------------------------


@given(st.text())
def test_no_text_is_too_odd(text: str) -> None:
    assert isinstance(repetition(text), str)


words = st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=8)


@given(
    before=st.lists(st.from_regex(r"[A-Z]{1,6}", fullmatch=True), max_size=10),
    group=words,
    after=st.lists(st.from_regex(r"[A-Z]{1,6}", fullmatch=True), max_size=10),
    times=st.integers(REPEATS, REPEATS + 3),
    space=st.sampled_from([" ", "\n", "  ", "\t"]),
)
def test_a_planted_repetition_is_found(
    before: list[str], group: list[str], after: list[str], times: int, space: str
) -> None:
    found = repetition(space.join([*before, *group * times, *after]))
    assert found
    assert set(found.split("'")[1].split()) <= set(group)


@given(st.lists(st.integers(0, 999), max_size=60, unique=True), st.integers(1, REPEATS - 1))
def test_what_repeats_less_is_not(numbers: list[int], times: int) -> None:
    text = " ".join(f"w{number}" for number in numbers)
    assert repetition(" ".join([text] * times)) == ""


@given(st.from_regex(r"[a-zA-Z!的]{1,4}", fullmatch=True), st.integers(24, 80))
def test_a_row_of_characters_is_found(group: str, times: int) -> None:
    assert "in a row" in repetition(f"It is {group * times}")


@pytest.mark.parametrize(
    "text",
    [
        "-" * 80,
        "| --- | --- |\n" * (REPEATS - 1),
        "=" * 40 + "\ntitle\n" + "~" * 40,
        "." * 30,
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
        "hahahahaha",
        "a" * 23,
    ],
)
def test_rules_and_laughter_are_text(text: str) -> None:
    assert repetition(text) == ""


# --- what is sent -----------------------------------------------------------------------------


def test_every_prompt_is_asked_in_order_and_kept(client: Client, model: Model) -> None:
    model.say = lambda text: (f"on {text}.", "stop")
    done: list[tuple[int, int]] = []
    file = Prompts(
        version=1,
        name="f",
        prompts=(
            prompt(name="one", prompt="first", max_tokens=16),
            prompt("chat", name="two", messages=[user("second")], min_baseline_similarity=0.5),
        ),
    )
    records = measure(client, file, (), lambda *x: done.append(x))
    assert [(r["name"], r["kind"], r["prompt"], r["answer"]) for r in records] == [
        ("one", "completion", "first", "on first."),
        ("two", "chat", "second", "on second."),
    ]
    assert all(check["passed"] for record in records for check in record["checks"])
    assert records[0]["finish_reason"] == "stop"
    assert records[0]["completion_tokens"] == len("on first.")
    assert "min_baseline_similarity" not in records[0]
    assert records[1]["min_baseline_similarity"] == 0.5
    assert done == [(1, 2), (2, 2)]
    paths = [path for path, _ in model.requests]
    assert paths == ["/v1/completions", "/v1/chat/completions"]
    assert model.requests[0][1]["max_tokens"] == 16


@pytest.mark.parametrize(("copies", "expected"), [(None, 8), (3, 3)])
def test_copies_are_under_way_at_once(
    copies: int | None, expected: int, client: Client, model: Model
) -> None:
    together = threading.Barrier(expected, timeout=20)  # passes only when all of them have come

    def say(text: str) -> tuple[str, str]:
        together.wait()
        return "fine.", "stop"

    model.say = say
    records = run(client, prompt("concurrent", name="many", copies=copies))
    assert [record["name"] for record in records] == [
        "many", *(f"many-{number}" for number in range(2, expected + 1))
    ]  # fmt: skip
    assert {record["answer"] for record in records} == {"fine."}


FILLER = "the ships came in, the ships went out."


def long_context(**keys: Any) -> Prompt:
    return prompt("long_context", **({"filler": FILLER, "max_tokens": 16} | keys))


def sent_tokens(model: Model) -> int:
    """Prompt tokens of the last request, as the server counts them."""
    path, body = model.requests[-1]
    if path == "/v1/completions":
        return len(model.encode(body["prompt"], special=True))
    return len(model.tokenize(body))


@pytest.mark.parametrize("messages", [[], [user("remember xyz."), user("which word?")]])
def test_a_filler_of_the_wanted_length(
    messages: list[dict[str, str]], client: Client, model: Model
) -> None:
    model.max_model_len = 4096
    given = {"messages": messages} if messages else {"prompt": "which word?"}
    (record,) = run(client, long_context(context_tokens=1000, **given))
    assert record["prompt"].endswith(FILLER + "\n\nwhich word?")
    filler = record["prompt"].removesuffix("\n\nwhich word?")
    tokens = len(model.encode(filler, special=False))
    assert 1000 - len(FILLER) - 1 <= tokens <= 1000
    if messages:  # the other turns stay as they are
        assert model.requests[-1][1]["messages"][0] == messages[0]


@pytest.mark.parametrize("template", [0, 7, 90])
@pytest.mark.parametrize("messages", [[], [user("remember xyz."), user("which word?")]])
def test_a_filler_leaves_room_for_template_and_answer(
    messages: list[dict[str, str]], template: int, client: Client, model: Model
) -> None:
    model.template = template
    given = {"messages": messages} if messages else {"prompt": "which word?"}
    run(
        client, long_context(context_tokens=100_000, **given)
    )  # the server refuses what is too long
    unused = model.max_model_len - 16 - sent_tokens(model)
    assert 0 <= unused <= len(FILLER) + 10


def test_a_prompt_that_cannot_fit_is_the_users(client: Client, model: Model) -> None:
    model.max_model_len = 30
    with pytest.raises(SourceError, match="maximum context length is 30"):
        run(client, long_context(context_tokens=1000))
