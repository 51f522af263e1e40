"""How the other servers than vLLM are asked, and what they have no answer to.

llama.cpp's dialect was run; those of SGLang, TGI and Ollama are written by their documentation (see
docs/servers.md), and so is nothing but what every measurement needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError, ResourceError, SourceError, ToolError
from quantize.measure.client import Answer, Client, Limits, VllmClient, json_object
from quantize.servers.base import gguf_file

READ_BYTES = 1 << 20

NO_BENCHMARK = "vLLM's benchmark of latency and throughput is run against vLLM alone"
UNTRIED = "checked against its documentation only, which tells of no such request"
PROBE = (1, 1)
"""Token ids that every tokenizer has."""


class LlamaCppClient(Client):
    """llama-server, as in llama.cpp's `tools/server/README.md`; `/v1` as OpenAI's."""

    SERVER = "llama-server's"

    def limits(self) -> Limits:
        """It scores no prompt; the library does (:mod:`quantize.measure.library`)."""
        why = "llama-server gives no log-probabilities of a prompt's tokens"
        hidden = "llama-server leaves special tokens out of what it answers"
        return Limits(scores=why, choices=why, load=NO_BENCHMARK, special=hidden)

    def version(self) -> str:
        """The build that llama.cpp gives itself."""
        return str(self._props()["build_info"])

    def max_model_len(self) -> int:
        """Tokens of one slot: the context is cut into as many parts as there are slots."""
        with self._understood("/props"):
            return int(self._props()["default_generation_settings"]["n_ctx"])

    def slots(self) -> int:
        """Requests that are decoded together at most."""
        return int(self._props()["total_slots"])

    def complete(self, prompt: str, max_tokens: int, **more: Any) -> Answer:
        """A schema has another name here where there is no chat."""
        form = more.pop("response_format", None)
        if form is not None:
            more["json_schema"] = form["json_schema"]["schema"]
        return super().complete(prompt, max_tokens, **more)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Special tokens that stand in the text are read as such, as other tokenizers do."""
        body = {"content": text, "add_special": special, "parse_special": True}
        reply, _ = self._post("/tokenize", body)
        with self._understood("/tokenize"):
            return [int(token) for token in reply["tokens"]]

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The template's text, tokenized."""
        reply, _ = self._post("/apply-template", {"messages": list(messages)})
        with self._understood("/apply-template"):
            return self.tokenize(str(reply["prompt"]), special=True)

    def go_on(self, tokens: Sequence[int], count: int) -> tuple[list[int], float]:
        """Greedy continuation of token ids, without what ends it; the first's log-probability."""
        body = {
            "prompt": list(tokens),
            "n_predict": count,
            "temperature": 0.0,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": False,
        }
        reply, _ = self._post("/completion", body)
        with self._understood("/completion"):
            first = reply["completion_probabilities"][0]
            made = [int(token) for token in reply["tokens"]]
            ended = reply["stop_type"] == "eos"
            return made[: len(made) - ended], float(first["logprob"])

    def _props(self) -> dict[str, Any]:
        with self._understood("/props"):
            return json_object(self._get("/props"))


class SglangClient(VllmClient):
    """SGLang: the requests of vLLM, but for scores."""

    SERVER = "SGLang's"

    def limits(self) -> Limits:
        """See the base."""
        why = f"log-probabilities of a prompt through SGLang: {UNTRIED}"
        return Limits(scores=why, choices=why, load=NO_BENCHMARK)

    def version(self) -> str:
        """See the base."""
        with self._understood("/server_info"):
            return str(json_object(self._get("/server_info"))["version"])


class TgiClient(Client):
    """Text Generation Inference."""

    SERVER = "TGI's"

    def limits(self) -> Limits:
        """See the base."""
        why = f"token ids and special tokens through TGI: {UNTRIED}"
        return Limits(why, why, why, why, load=NO_BENCHMARK, special=why)

    def version(self) -> str:
        """See the base."""
        return str(self._info()["version"])

    def max_model_len(self) -> int:
        """See the base."""
        with self._understood("/info"):
            return int(self._info()["max_total_tokens"])

    def _info(self) -> dict[str, Any]:
        with self._understood("/info"):
            return json_object(self._get("/info"))


class OllamaClient(Client):
    """Ollama, whose server starts without a model and is given one."""

    SERVER = "Ollama's"
    HEALTH = "/api/version"

    def limits(self) -> Limits:
        """See the base."""
        no_ids = "Ollama takes and gives no token ids"
        none = "Ollama gives no log-probabilities of a prompt's tokens"
        special = "Ollama leaves special tokens out of what it answers"
        return Limits(no_ids, none, none, no_ids, load=NO_BENCHMARK, special=special)

    def version(self) -> str:
        """See the base."""
        with self._understood("/api/version"):
            return str(json_object(self._get("/api/version"))["version"])

    def max_model_len(self) -> int:
        """What :meth:`prepare` asked for."""
        reply, _ = self._post("/api/show", {})
        with self._understood("/api/show"):
            lines = [line.split() for line in str(reply["parameters"]).splitlines()]
            return int(next(words[1] for words in lines if words and words[0] == "num_ctx"))

    def prepare(self, model: Path, max_model_len: int | None) -> None:
        """Push the GGUF file as a blob, and make a model of it."""
        path = gguf_file(model)
        with path.open("rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            pieces = iter(lambda: file.read(READ_BYTES), b"")
            self._ask("POST", f"/api/blobs/{digest}", accept=(200, 201), content=pieces)
        wanted = {"num_ctx": max_model_len} if max_model_len is not None else {}
        body = {"files": {path.name: digest}, "parameters": wanted, "stream": False}
        self._post("/api/create", body)


class OpenAIClient(VllmClient):
    """An endpoint that somebody else has started: asked what it answers to, once."""

    SERVER = "an OpenAI-compatible server's"

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        max_model_len: int | None = None,
    ) -> None:
        super().__init__(base_url, model, api_key=api_key)
        self._limits: Limits | None = None
        self._max_model_len = max_model_len

    def healthy(self) -> bool:
        """Whether it lists its models: not every endpoint has a `/health`."""
        try:
            return bool(self.served())
        except QuantizeError:
            return False

    def version(self) -> str:
        """vLLM's, or that it is not said."""
        try:
            return super().version()
        except (SourceError, ToolError):
            return "not said"

    def max_model_len(self) -> int:
        """What the endpoint says, as vLLM does, or else the recipe."""
        said = [entry for entry in self.served() if entry.get("id") == self.model]
        found = next((entry.get("max_model_len") for entry in said), None) or self._max_model_len
        if found is None:
            raise ResourceError(
                "the endpoint does not say how long its context is",
                "say it in the recipe: serve.max_model_len",
            )
        return int(found)

    def check_model(self) -> None:
        """Raise a ResourceError if the endpoint does not list the model that the recipe names."""
        names = [str(entry.get("id")) for entry in self.served()]
        if self.model not in names:
            raise ResourceError(
                f"the endpoint serves {', '.join(names) or 'nothing'}, and not {self.model}",
                "correct the endpoint's model in serve.endpoints, or start another one",
            )

    def limits(self) -> Limits:
        """What it is seen to answer: token ids, and log-probabilities as vLLM gives them."""
        if self._limits is None:
            tokens = _refusal(lambda: self.tokenize("a", special=True))
            scores = _refusal(lambda: self.score(PROBE, 1))
            ids = _refusal(lambda: self._post("/v1/completions", _one_token()))
            echo = _refusal(self._echo)
            self._limits = Limits(
                tokens=tokens,
                scores=scores,
                choices=ids or echo,
                tasks=ids,
                load="an endpoint that others may use is put under no load",
                special="whether the endpoint writes special tokens into its answers is not known",
            )
        return self._limits

    def _echo(self) -> None:
        """What lm-eval asks of a choice: a prompt's own log-probabilities."""
        more = {"echo": True, "logprobs": 1}
        reply, _ = self._post("/v1/completions", _one_token() | more)
        with self._understood("/v1/completions"):
            found = reply["choices"][0]["logprobs"]
            if min(len(found["token_logprobs"]), len(found["top_logprobs"])) < len(PROBE):
                raise ValueError("no log-probabilities of the prompt")


def _one_token() -> dict[str, Any]:
    return {"prompt": list(PROBE), "max_tokens": 1, "temperature": 0.0}


def _refusal(ask: Callable[[], object]) -> str | None:
    """Why the endpoint has no answer, or None; that it is gone is an error."""
    try:
        ask()
    except (SourceError, ToolError) as error:
        return f"the endpoint does not give it: {error.message}"
    return None
