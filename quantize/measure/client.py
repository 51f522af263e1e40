"""The few calls of vLLM's HTTP API that the measurement makes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from quantize.errors import SourceError, ToolError, TransientError

TIMEOUT = httpx.Timeout(7200.0, connect=30.0, write=300.0, pool=None)
"""Seconds of silence. An answer may wait behind all the others: what hangs is found before by who
watches the server (:mod:`quantize.measure.watching`)."""
HEALTH_SECONDS = 5.0
MAX_CONNECTIONS = 512
SHOWN_CHARACTERS = 200
IMPOSSIBLE = -9999.0
"""What vLLM writes for a log-probability of -inf, which JSON cannot hold."""
NOT_A_NUMBER = (
    "the server computes log-probabilities that are not numbers",
    "the checkpoint's activations overflow or are NaN: look for damaged weights",
)

OTHER = "another program may have taken the port: run the same command again"


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class ScoredPrompt:
    """Log-probabilities of a prompt's tokens, nats; the first token has none.

    `logprobs` (tokens - 1,); `top` holds, per position, (token id, log-probability) of the most
    likely tokens, best first.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class Client:
    """A connection to one server and the one model that it serves. Threads may share it."""

    def __init__(self, base_url: str, model: str, timeout: float | httpx.Timeout = TIMEOUT) -> None:
        self.model = model
        self.base_url = base_url
        self._lock = threading.Lock()
        self.waiting = 0  # requests that have no answer yet
        self.answered = 0
        self._http = httpx.Client(
            base_url=base_url,
            timeout=timeout,
            trust_env=False,  # a proxy has no business with the loopback interface
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        )

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False

    def version(self) -> str:
        """The server's own version."""
        with _understood("/version"):
            return str(_json(self._get("/version"))["version"])

    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        with _understood("/v1/models"):
            return int(_json(self._get("/v1/models"))["data"][0]["max_model_len"])

    def complete(self, prompt: str, max_tokens: int, **more: Any) -> Answer:
        """Greedy completion of a text; `more` are further keys of the request."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **more}
        reply, seconds = self._post("/v1/completions", body)
        with _understood("/v1/completions"):
            return _answer(reply, seconds, ("text",))

    def chat(self, messages: Sequence[dict[str, str]], max_tokens: int, **more: Any) -> Answer:
        """Greedy answer to a conversation, through the checkpoint's chat template."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0, **more}
        reply, seconds = self._post("/v1/chat/completions", body)
        with _understood("/v1/chat/completions"):
            return _answer(reply, seconds, ("message", "content"))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, with or without what the tokenizer adds (BOS)."""
        return self._tokens({"prompt": text, "add_special_tokens": special})

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation as :meth:`chat` sends it, with all that the template adds."""
        return self._tokens({"messages": list(messages)})

    def score(self, tokens: Sequence[int], top_k: int) -> ScoredPrompt:
        """Log-probabilities of the tokens of a prompt, with the `top_k` best at each position."""
        body = {
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top_k,
            "add_special_tokens": False,
        }
        reply, _ = self._post("/v1/completions", body)
        with _understood("/v1/completions"):
            return _scored(reply, tokens, top_k)

    def metrics(self) -> dict[str, float]:
        """Prometheus samples, summed over labels; buckets are left out."""
        values: dict[str, float] = {}
        for line in self._get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            if name and not line.startswith("#") and not name.endswith(("_bucket", "_created")):
                with _understood("/metrics"):
                    values[name] = values.get(name, 0.0) + float(value)
        return values

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        reply, _ = self._post("/tokenize", body)
        with _understood("/tokenize"):
            return [int(token) for token in reply["tokens"]]

    def _get(self, path: str) -> httpx.Response:
        return self._ask("GET", path)

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        response = self._ask("POST", path, json={"model": self.model, **body})
        with _understood(path):
            return _json(response), time.monotonic() - started

    def _ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            with self._counted():
                response = self._http.request(method, path, **body)
        except httpx.HTTPError as error:
            raise TransientError(
                f"the server stopped answering at {path}: {type(error).__name__}: {error}",
                "run the same command again; finished parts are not repeated",
            ) from error
        if response.status_code == 200:
            return response
        reason = _reason(response)
        if "not JSON compliant" in reason:  # how vLLM 0.32 answers when a log-probability is NaN
            raise ToolError(*NOT_A_NUMBER)
        if response.status_code == 400:
            raise SourceError(f"the server refuses a request to {path}: {reason}")
        raise ToolError(f"{path} answered {response.status_code}: {reason}")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A request under way, for who watches whether answers still come."""
        with self._lock:
            self.waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self.waiting -= 1
                self.answered += 1


class _Garbled(Exception):
    """A reply that is not JSON, or not an object."""


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise _Garbled(response.text[:SHOWN_CHARACTERS]) from error
    if not isinstance(value, dict):
        raise _Garbled(response.text[:SHOWN_CHARACTERS])
    return value


@contextmanager
def _understood(path: str) -> Iterator[None]:
    """A reply that is not of the form that vLLM gives is the server's fault, and no bug of ours."""
    try:
        yield
    except _Garbled as error:
        raise ToolError(f"{path} answered with what is no JSON object: {error}", OTHER) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ToolError(f"{path} answered in a form that is not vLLM's ({said})", OTHER) from error


def _scored(reply: dict[str, Any], tokens: Sequence[int], top_k: int) -> ScoredPrompt:
    logprobs, top = [], []
    for token, entry in zip(tokens[1:], reply["choices"][0]["prompt_logprobs"][1:], strict=True):
        logprobs.append(_finite(entry[str(token)]["logprob"]))
        if logprobs[-1] <= IMPOSSIBLE:
            raise ToolError(
                f"the server gives token {token} of the text a probability of zero",
                "its perplexity is infinite: look for damaged weights",
            )
        ranked = sorted((v["rank"], int(k), v["logprob"]) for k, v in entry.items())
        top.append([(k, _finite(value)) for _, k, value in ranked[:top_k]])
    return ScoredPrompt(logprobs, top)


def _answer(reply: dict[str, Any], seconds: float, where: tuple[str, ...]) -> Answer:
    choice = reply["choices"][0]
    text = choice
    for name in where:
        text = text[name]
    return Answer(
        text or "",
        str(choice["finish_reason"]),
        int(reply["usage"]["prompt_tokens"]),
        int(reply["usage"]["completion_tokens"]),
        seconds,
    )


def _finite(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ToolError(*NOT_A_NUMBER)
    return value


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
        return str(body.get("error", body).get("message", body))[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
