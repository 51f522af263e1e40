"""The few calls that the measurement makes of a server: OpenAI's API, and vLLM's beyond it.

:class:`Client` is what all servers share, :class:`VllmClient` speaks vLLM's dialect;
:mod:`quantize.measure.dialects` has those of the others.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Limits:
    """What a server cannot be asked for, each with the reason; None where it can."""

    tokens: str | None = None  # the ids of a text: held-out text, prompts of a given length
    scores: str | None = None  # log-probabilities of a prompt's tokens: held-out text
    choices: str | None = None  # the same as OpenAI's `echo` gives them: tasks with choices
    tasks: str | None = None  # prompts as token ids: every task
    load: str | None = None  # requests of vLLM's benchmark
    special: str | None = None  # special tokens as text: whether an answer echoes the template


class Client:
    """A connection to one server and the one model that it serves. Threads may share it.

    A subclass says in :meth:`limits` what its server has no answer to; nobody then calls what
    :class:`Client` leaves open.
    """

    SERVER = "the OpenAI API's"
    HEALTH = "/health"

    def __init__(
        self,
        base_url: str,
        model: str,
        timeout: float | httpx.Timeout = TIMEOUT,
        api_key: str | None = None,
    ) -> None:
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
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )

    def limits(self) -> Limits:
        """What this server cannot be asked for."""
        return Limits()

    def prepare(self, model: Path, max_model_len: int | None) -> None:
        """What a server that answers still needs before it serves the folder `model`."""

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self._http.get(self.HEALTH, timeout=HEALTH_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False

    def served(self) -> list[dict[str, Any]]:
        """The models that the server lists."""
        with self._understood("/v1/models"):
            return [dict(entry) for entry in json_object(self._get("/v1/models"))["data"]]

    def version(self) -> str:
        """The server's own version."""
        raise NotImplementedError

    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        raise NotImplementedError

    def complete(self, prompt: str, max_tokens: int, **more: Any) -> Answer:
        """Greedy completion of a text; `more` are further keys of the request."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **more}
        reply, seconds = self._post("/v1/completions", body)
        with self._understood("/v1/completions"):
            return _answer(reply, seconds, ("text",))

    def chat(self, messages: Sequence[dict[str, str]], max_tokens: int, **more: Any) -> Answer:
        """Greedy answer to a conversation, through the checkpoint's chat template."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0, **more}
        reply, seconds = self._post("/v1/chat/completions", body)
        with self._understood("/v1/chat/completions"):
            return _answer(reply, seconds, ("message", "content"))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, with or without what the tokenizer adds (BOS)."""
        raise NotImplementedError

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation as :meth:`chat` sends it, with all that the template adds."""
        raise NotImplementedError

    def score(self, tokens: Sequence[int], top_k: int) -> ScoredPrompt:
        """Log-probabilities of the tokens of a prompt, with the `top_k` best at each position."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Prometheus samples, summed over labels; buckets are left out."""
        values: dict[str, float] = {}
        for line in self._get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            if name and not line.startswith("#") and not name.endswith(("_bucket", "_created")):
                with self._understood("/metrics"):
                    values[name] = values.get(name, 0.0) + float(value)
        return values

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _get(self, path: str) -> httpx.Response:
        return self._ask("GET", path)

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        response = self._ask("POST", path, json={"model": self.model, **body})
        with self._understood(path):
            return json_object(response), time.monotonic() - started

    def _ask(
        self, method: str, path: str, *, accept: Sequence[int] = (200,), **body: Any
    ) -> httpx.Response:
        try:
            with self._counted():
                response = self._http.request(method, path, **body)
        except httpx.HTTPError as error:
            raise TransientError(
                f"the server stopped answering at {path}: {type(error).__name__}: {error}",
                "run the same command again; finished parts are not repeated",
            ) from error
        if response.status_code in accept:
            return response
        reason = _reason(response)
        if "not JSON compliant" in reason:  # how vLLM 0.32 answers when a log-probability is NaN
            raise ToolError(*NOT_A_NUMBER)
        if response.status_code == 400:
            raise SourceError(f"the server refuses a request to {path}: {reason}")
        raise ToolError(f"{path} answered {response.status_code}: {reason}")

    @contextmanager
    def _understood(self, path: str) -> Iterator[None]:
        """A reply that is not of the server's form is the server's fault, and no bug of ours."""
        try:
            yield
        except _Garbled as error:
            said = f"{path} answered with what is no JSON object: {error}"
            raise ToolError(said, OTHER) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            what = f"{path} answered in a form that is not {self.SERVER} ({said})"
            raise ToolError(what, OTHER) from error

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


class VllmClient(Client):
    """vLLM's dialect, which SGLang speaks too, but for scores."""

    SERVER = "vLLM's"

    def version(self) -> str:
        """See the base."""
        with self._understood("/version"):
            return str(json_object(self._get("/version"))["version"])

    def max_model_len(self) -> int:
        """See the base."""
        with self._understood("/v1/models"):
            return int(json_object(self._get("/v1/models"))["data"][0]["max_model_len"])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """See the base."""
        return self._tokens({"prompt": text, "add_special_tokens": special})

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """See the base."""
        return self._tokens({"messages": list(messages)})

    def score(self, tokens: Sequence[int], top_k: int) -> ScoredPrompt:
        """See the base."""
        body = {
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top_k,
            "add_special_tokens": False,
        }
        reply, _ = self._post("/v1/completions", body)
        with self._understood("/v1/completions"):
            return _scored(reply, tokens, top_k)

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        reply, _ = self._post("/tokenize", body)
        with self._understood("/tokenize"):
            return [int(token) for token in reply["tokens"]]


class _Garbled(Exception):
    """A reply that is not JSON, or not an object."""


def json_object(response: httpx.Response) -> dict[str, Any]:
    """A reply's JSON object; what is none is understood by nobody (:meth:`Client._understood`)."""
    try:
        value = response.json()
    except ValueError as error:
        raise _Garbled(response.text[:SHOWN_CHARACTERS]) from error
    if not isinstance(value, dict):
        raise _Garbled(response.text[:SHOWN_CHARACTERS])
    return value


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
