"""Generation health: what is asked, and what is seen in the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_server import Model

from quantize.errors import SourceError, ToolError, TransientError
from quantize.measure.client import Client
from quantize.measure.health import HealthPrompt, measure, read_prompts, schema_error
from quantize.records import Answered, Health, Missing
from quantize.resources import shipped_root

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def plain(name: str, text: str = "go on") -> HealthPrompt:
    return HealthPrompt(name=name, prompt=text)


def chat(name: str, text: str = "say", **keys: Any) -> HealthPrompt:
    value = {"name": name, "messages": [{"role": "user", "content": text}], **keys}
    return HealthPrompt.model_validate_json(json.dumps(value))


def run(
    client: Client, folder: Path, *prompts: HealthPrompt, special: tuple[str, ...] = ()
) -> tuple[Health | None, list[Missing], list[Answered]]:
    output = folder / "health.jsonl"
    rates, refused = measure(client, prompts, 32, special, output, 4, lambda done, total: None)
    lines = output.read_text(encoding="utf-8").split("\n")
    return rates, refused, [json.loads(line) for line in lines if line]


def test_rates_of_known_answers(client: Client, model: Model, tmp_path: Path) -> None:
    answers = {
        "fine": ("a sound answer.", "stop"),
        "repeats": ("no " * 8, "length"),
        "empty": ("", "stop"),
        "short": ("yes", "stop"),
        "broken": ("gr\ufffdn is a colour", "stop"),
        "echo": ("well <|end|><|user|> and so on", "stop"),
        "half": ("it ran out of tokens \ufffd", "length"),  # in the middle of a character
    }
    model.say = lambda text: answers[text]
    prompts = [chat(name, name) for name in answers]
    rates, refused, lines = run(client, tmp_path, *prompts, special=("<|end|>", "<|user|>", "<s>"))
    assert refused == []
    assert rates is not None
    assert {line["name"]: line["answer"] for line in lines} == {
        name: answer for name, (answer, _) in answers.items()
    }
    seventh = pytest.approx(1 / 7)
    assert (rates["prompts"], rates["max_tokens"], rates["schema_prompts"]) == (7, 32, 0)
    assert rates["repeating"] == rates["invalid_utf8"] == rates["template_echo"] == seventh
    assert rates["ended_early"] == rates["cut_off"] == pytest.approx(2 / 7)
    assert "schema_valid" not in rates
    found = {line["name"]: line for line in lines}
    assert "6 or more times" in found["repeats"]["repeats"]
    assert found["echo"]["echoed"] == ["<|end|>", "<|user|>"]
    assert found["broken"]["replacement_characters"] == 1
    assert found["half"]["replacement_characters"] == 0
    assert all("schema_error" not in line for line in lines)
    lengths = sorted(min(len(answer), 32) for answer, _ in answers.values())
    assert rates["tokens_median"] == lengths[3]
    assert lengths[0] <= rates["tokens_p10"] <= rates["tokens_p90"] <= lengths[-1]


def test_what_is_sent(client: Client, model: Model, tmp_path: Path) -> None:
    model.say = lambda text: ('{"a": 1}', "stop")
    run(client, tmp_path, plain("p", "on and on"), chat("c", "hello", schema=SCHEMA))
    bodies = dict(model.requests)
    completion = bodies["/v1/completions"]
    assert (completion["prompt"], completion["max_tokens"]) == ("on and on", 32)
    assert "response_format" not in completion
    conversation = bodies["/v1/chat/completions"]
    assert conversation["messages"] == [{"role": "user", "content": "hello"}]
    assert conversation["response_format"]["json_schema"]["schema"] == SCHEMA
    for body in (completion, conversation):
        assert body["temperature"] == 0
        assert body["skip_special_tokens"] is False  # else no echo could be seen


@pytest.mark.parametrize(
    ("answer", "reason", "error"),
    [
        ('{"a": 1}', "stop", ""),
        ('{"a": "1"}', "stop", "$.a: '1' is not of type 'integer'"),
        ("{}", "stop", "$: 'a' is a required property"),
        ('{"a": 1, "b": 2}', "stop", "$: Additional properties are not allowed"),
        ("no object", "stop", "not JSON: "),
        ('{"a": 1', "length", "cut off after 32 tokens: not JSON: "),
        ('{"a": 1}', "length", ""),
    ],
)
def test_answers_by_a_schema(
    answer: str, reason: str, error: str, client: Client, model: Model, tmp_path: Path
) -> None:
    model.say = lambda text: (answer, reason)
    rates, _, (line,) = run(client, tmp_path, chat("c", schema=SCHEMA))
    assert line["schema_error"].startswith(error)
    assert bool(line["schema_error"]) == bool(error)
    assert rates is not None
    assert (rates["schema_prompts"], rates["schema_valid"]) == (1, 0.0 if error else 1.0)


def test_the_library_decides() -> None:
    assert schema_error({"type": "string", "maxLength": 2}, '"abc"') == "$: 'abc' is too long"
    assert schema_error({"enum": [1, 2]}, "2") == ""
    assert schema_error({}, "null") == ""


def test_a_server_without_structured_output(client: Client, model: Model, tmp_path: Path) -> None:
    model.structured = False
    prompts = [plain("p"), chat("c", schema=SCHEMA), chat("d", schema=SCHEMA)]
    rates, refused, lines = run(client, tmp_path, *prompts)
    assert [line["name"] for line in lines] == ["p"]
    assert rates is not None
    assert (rates["prompts"], rates["schema_prompts"]) == (1, 0)
    (missing,) = refused
    assert missing["what"] == "structured output"
    assert "structured outputs are not supported" in missing["why"]
    rates, refused, lines = run(client, tmp_path, chat("c", schema=SCHEMA))
    assert (rates, lines, len(refused)) == (None, [], 1)


def test_a_refused_prompt_without_a_schema_is_an_error(
    client: Client, model: Model, tmp_path: Path
) -> None:
    model.max_model_len = 20
    with pytest.raises(SourceError, match="maximum context length"):
        run(client, tmp_path, plain("p"))


@pytest.mark.parametrize(("fault", "error"), [("drop", TransientError), ("500", ToolError)])
def test_a_server_that_dies_is_no_refusal(
    fault: str, error: type[Exception], client: Client, model: Model, tmp_path: Path
) -> None:
    model.fault = fault
    with pytest.raises(error):
        run(client, tmp_path, chat("c", schema=SCHEMA))
    assert not (tmp_path / "health.jsonl").exists()


def test_other_prompts_have_another_digest(client: Client, tmp_path: Path) -> None:
    def sha(*prompts: HealthPrompt) -> str:
        rates, _, _ = run(client, tmp_path, *prompts)
        assert rates is not None
        return rates["prompts_sha256"]

    assert sha(plain("p")) == sha(plain("p"))
    assert len({sha(plain("p")), sha(plain("p", "other")), sha(chat("p", "go on"))}) == 3


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plain", "a.jsonl:2: .*Invalid JSON"),
        ('{"name": "b"}', "a.jsonl:2: .*either prompt or messages"),
        ('{"name": "b", "prompt": "x", "promt": 1}', "a.jsonl:2: promt: "),
        ('{"name": "a", "prompt": "x"}', "a.jsonl:2: the name 'a' stands twice"),
        ('{"name": "b", "prompt": "x", "schema": {"type": "thing"}}', "a.jsonl:2: schema: 'thing'"),
        ('{"name": "b", "messages": [{"role": "robot", "content": "x"}]}', "a.jsonl:2: messages.0"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "a", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(SourceError, match=message):
        read_prompts(path, None)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="no prompts"):
        read_prompts(tmp_path / "a.jsonl", None)


@pytest.mark.parametrize("name", ["default", "base", "tiny"])
def test_shipped_prompts(name: str) -> None:
    path = shipped_root() / "eval" / "health" / f"{name}.jsonl"
    prompts = read_prompts(path, None)
    assert len(prompts) >= 24
    assert sum(prompt.json_schema is not None for prompt in prompts) >= 6
    assert all((prompt.prompt is not None) == (name == "base") for prompt in prompts)
    quick = read_prompts(path, 16)
    assert quick == prompts[:16]
    assert any(prompt.json_schema is not None for prompt in quick)
