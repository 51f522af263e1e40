"""The HTTP client against a server that answers, and errs, like vLLM 0.32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from model_server import BOS, FIRST, VOCABULARY, Model, serving

from quantize.errors import SourceError, ToolError, TransientError
from quantize.measure.client import Client, VllmClient


def test_what_the_server_says_of_itself(client: Client) -> None:
    assert client.healthy()
    assert client.version() == "0.32.0"
    assert client.max_model_len() == 512


def test_completion_and_chat(client: Client, model: Model) -> None:
    model.say = lambda prompt: (f"on {prompt}", "length")
    answer = client.complete("abc", 16)
    assert (answer.text, answer.finish_reason) == ("on abc", "length")
    assert (answer.prompt_tokens, answer.completion_tokens) == (4, 6)
    assert answer.seconds > 0
    messages = [{"role": "user", "content": "ab"}]
    assert client.chat(messages, 8).text == "on ab"
    sent = [body for _, body in model.requests]
    assert sent[0] == {"model": "model", "prompt": "abc", "max_tokens": 16, "temperature": 0.0}
    assert sent[1] == {"model": "model", "messages": messages, "max_tokens": 8, "temperature": 0.0}


def test_no_content_is_an_empty_answer(client: Client, model: Model) -> None:
    model.say = lambda prompt: (None, "stop")  # type: ignore[assignment,return-value]
    model.reply = lambda ids, most, text, choice: {  # type: ignore[assignment,method-assign]
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 0},
    }
    assert client.chat([{"role": "user", "content": "a"}], 8).text == ""


def test_tokenize(client: Client, model: Model) -> None:
    assert client.tokenize("abc", special=False) == [FIRST, FIRST + 1, FIRST + 2]
    assert client.tokenize("abc", special=True) == [BOS, FIRST, FIRST + 1, FIRST + 2]
    assert client.tokenize("", special=False) == []
    messages = [{"role": "user", "content": "abc"}]
    assert len(client.tokenize_chat(messages)) == 1 + model.template + 3


def test_score(client: Client, model: Model) -> None:
    tokens = [BOS, FIRST + 20, FIRST, 0]
    scored = client.score(tokens, 3)
    assert scored.logprobs == [model.logprobs[token] for token in tokens[1:]]
    # the three best, best first, whether or not the text's own token is among them
    best = [(token, model.logprobs[token]) for token in (0, 1, 2)]
    assert scored.top == [best, best, best]
    (_, body) = model.requests[-1]
    assert (body["max_tokens"], body["add_special_tokens"]) == (1, False)


def test_top_one_is_the_best_and_not_the_text(client: Client) -> None:
    scored = client.score([BOS, FIRST + 20], 1)
    assert [[token for token, _ in top] for top in scored.top] == [[0]]


def test_more_top_tokens_than_there_are(client: Client) -> None:
    scored = client.score([BOS, FIRST], 100)
    assert len(scored.top[0]) == VOCABULARY


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("nan", ToolError, "log-probabilities that are not numbers"),
        ("null", ToolError, "log-probabilities that are not numbers"),
        ("impossible", ToolError, f"token {FIRST} of the text a probability of zero"),
        ("500", ToolError, "/v1/completions answered 500: Internal Server Error"),
        ("drop", TransientError, "stopped answering at /v1/completions"),
    ],
)
def test_faults_while_scoring(
    fault: str, error: type[Exception], message: str, client: Client, model: Model
) -> None:
    model.fault = fault
    with pytest.raises(error, match=message) as caught:
        client.score([BOS, FIRST + 1, FIRST], 2)
    assert type(caught.value) is error


def test_an_impossible_token_beside_the_text_is_only_impossible(
    client: Client, model: Model
) -> None:
    model.logprobs[2] = -9999.0
    assert (2, -9999.0) in client.score([BOS, FIRST], VOCABULARY).top[0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda client: client.complete("a" * 600, 8), "maximum context length is 512 tokens"),
        (lambda client: client.score([BOS, FIRST], 5000), "greater than max allowed: 1000"),
    ],
)
def test_a_refused_request_is_the_users(
    ask: Callable[[Client], Any], message: str, client: Client
) -> None:
    with pytest.raises(SourceError, match=f"refuses a request to /v1/completions: .*{message}"):
        ask(client)


def test_a_model_that_is_not_served(model: Model) -> None:
    with serving(model) as url, pytest.raises(ToolError, match="answered 404: The model `other`"):
        VllmClient(url, "other").complete("a", 1)


ASKS: list[Callable[[Client], Any]] = [
    lambda client: client.version(),
    lambda client: client.max_model_len(),
    lambda client: client.metrics(),
    lambda client: client.tokenize("a", special=False),
    lambda client: client.chat([{"role": "user", "content": "a"}], 1),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_server_that_breaks_off(
    ask: Callable[[Client], Any], client: Client, model: Model
) -> None:
    model.fault = "drop"
    assert not client.healthy()
    with pytest.raises(TransientError, match="stopped answering at /") as caught:
        ask(client)
    assert "run the same command again" in caught.value.hint
    model.fault = "500"
    assert not client.healthy()
    with pytest.raises(ToolError, match="answered 500"):
        ask(client)


@pytest.mark.parametrize("ask", ASKS)
def test_a_server_that_is_gone(ask: Callable[[Client], Any], model: Model) -> None:
    with serving(model) as url:
        client = VllmClient(url, "model")
    assert not client.healthy()
    with pytest.raises(TransientError, match="stopped answering"):
        ask(client)


def test_a_proxy_is_not_asked(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    other = VllmClient(client.base_url, "model")
    assert other.healthy()
    other.close()


def test_metrics(client: Client) -> None:
    assert client.metrics() == {
        "vllm:request_success_total": 5.0,  # summed over its labels
        "vllm:e2e_request_latency_seconds_count": 5.0,
        "vllm:e2e_request_latency_seconds_sum": 1.25,
        "vllm:gpu_cache_usage_perc": 0.5,
        "process_open_fds": 31.0,
    }
