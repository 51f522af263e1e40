"""A language model small enough to know every number of, behind vLLM's HTTP interface.

Unigram over characters: p(token) does not depend on what came before, so the perplexity of a text
is exp of the mean of -log p over the tokens that are scored. Shapes of requests and answers, limits
and error texts are those that vLLM 0.32 was seen to give.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,?\n"
BOS, EOS = 1, 2
FIRST = 3  # id of ALPHABET[0]
VOCABULARY = FIRST + len(ALPHABET)

METRICS = """\
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a model"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="a model"} 3.0
# TYPE vllm:request_success_created gauge
vllm:request_success_created{engine="0",finished_reason="stop",model_name="a model"} 1.79e+09
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="a model"} 5.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="a model"} 5.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="a model"} 5.0
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="a model"} 1.25
vllm:gpu_cache_usage_perc{engine="0",model_name="a {odd} name = 7"} 0.5

process_open_fds 31
"""


GARBLED = {
    "not json": "<html>a proxy's page</html>",
    "a list": "[1, 2]",
    "other json": '{"choices": [], "usage": null, "data": {}, "count": 1}',
}
"""Answers with status 200 that are not vLLM's."""


class Refused(Exception):
    """Answered with a status and vLLM's error body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Model:
    """The model, its tokenizer, and what the server is told to do wrong."""

    def __init__(
        self, *, bos: bool = True, eos: bool = False, max_model_len: int = 512, template: int = 7
    ) -> None:
        self.bos, self.eos = bos, eos
        self.max_model_len = max_model_len
        self.template = template  # tokens that the chat template adds to each message
        self.max_logprobs = 1000
        weights = [1.0 / (1 + token) for token in range(VOCABULARY)]
        self.logprobs = [math.log(weight / sum(weights)) for weight in weights]
        self.fault = ""
        self.dies_after: int | None = None  # requests for completions, then nothing any more
        self.structured = True  # whether answers may be told to follow a JSON schema
        self.say: Callable[[str], tuple[str, str]] = lambda prompt: ("fine.", "stop")
        self.go_on: Callable[[dict[str, Any]], str] = lambda body: "x"  # after token ids
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = [FIRST + ALPHABET.index(character) for character in text]
        if not special:
            return ids
        return [BOS] * self.bos + ids + [EOS] * self.eos

    def perplexity(self, scored: Sequence[int]) -> float:
        """Of the tokens that are scored."""
        return math.exp(-math.fsum(self.logprobs[token] for token in scored) / len(scored))

    def entry(self, token: int, top_k: int) -> dict[str, Any]:
        """The `top_k` best and the token itself, as vLLM writes a position's log-probabilities."""
        ranked = sorted(range(VOCABULARY), key=lambda t: -self.logprobs[t])
        shown = [token, *(other for other in ranked[:top_k] if other != token)]
        return {
            str(t): {"logprob": self.logprobs[t], "rank": ranked.index(t) + 1, "decoded_token": "?"}
            for t in shown
        }

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((path, body))
        if body["model"] != "model":
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        match path:
            case "/tokenize":
                ids = self.tokenize(body)
                return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids}
            case "/v1/completions":
                return self.complete(body)
            case "/v1/chat/completions":
                ids = self.tokenize(body)
                self.check_form(body)
                text, reason = self.say(body["messages"][-1]["content"])
                choice = {"message": {"role": "assistant", "content": text}}
                return self.reply(ids, body["max_tokens"], text, choice | {"finish_reason": reason})
        raise Refused(404, "Not Found")

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        if "messages" not in body:
            return self.encode(body["prompt"], special=body["add_special_tokens"])
        ids = [BOS] * self.bos
        for message in body["messages"]:
            ids += [EOS] * self.template + self.encode(message["content"], special=False)
        return ids

    def check_form(self, body: dict[str, Any]) -> None:
        if "response_format" in body and not self.structured:
            raise Refused(400, "structured outputs are not supported")

    def echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """The prompt's own log-probabilities and a generated token's, as `echo` asks for them."""
        if self.fault == "nan":
            raise Refused(400, "Out of range float values are not JSON compliant")
        values = [self.logprobs[token % VOCABULARY] for token in [*ids[1:], 0]]
        top = [{"best": max(self.logprobs)} for _ in values]
        return {"token_logprobs": [None, *values], "top_logprobs": [None, *top]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, top_k = body["prompt"], body.get("prompt_logprobs")
        if top_k is not None and top_k > self.max_logprobs:
            raise Refused(
                400,
                f"Requested prompt logprobs of {top_k}, which is greater than max allowed: "
                f"{self.max_logprobs} (parameter=prompt_logprobs, value={top_k})",
            )
        ids = self.encode(prompt, special=True) if isinstance(prompt, str) else prompt
        self.check_form(body)
        text, reason = self.say(prompt) if isinstance(prompt, str) else (self.go_on(body), "length")
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        if body.get("echo"):
            choice["logprobs"] = self.echo(ids)
        if top_k is not None:
            if self.fault == "nan":
                raise Refused(400, "Out of range float values are not JSON compliant")
            entries = [None, *(self.entry(token, top_k) for token in ids[1:])]
            self.spoil(entries, ids)
            choice["prompt_logprobs"] = entries
        return self.reply(ids, body["max_tokens"], text, choice)

    def spoil(self, entries: list[Any], ids: Sequence[int]) -> None:
        if self.fault == "null":
            entries[-1][str(ids[-1])]["logprob"] = None
        if self.fault == "impossible":
            entries[-1][str(ids[-1])]["logprob"] = -9999.0
        if self.fault == "hopeless":
            for entry, token in zip(entries[1:], ids[1:], strict=True):
                entry[str(token)]["logprob"] = -5000.0

    def reply(
        self, ids: Sequence[int], max_tokens: int, text: str, choice: dict[str, Any]
    ) -> dict[str, Any]:
        if len(ids) + max_tokens > self.max_model_len:
            raise Refused(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, you "
                f"requested {len(ids) + max_tokens} tokens",
            )
        usage = {"prompt_tokens": len(ids), "completion_tokens": min(len(text), max_tokens)}
        return {"choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    model: Model
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two wait for each other

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.model.fault == "deaf":
            threading.Event().wait()
        if self.model.fault in GARBLED and self.path != "/health":
            self.send(200, GARBLED[self.model.fault])
            return
        if self.broken():
            return
        answers: Mapping[str, Any] = {
            "/health": "",
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "model", "max_model_len": self.model.max_model_len}]},
            "/metrics": METRICS,
        }
        value = answers[self.path]
        self.send(200, value if isinstance(value, str) else json.dumps(value))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.model.dies_after is not None and self.path != "/tokenize":
            self.model.dies_after -= 1
            if self.model.dies_after < 0:
                self.model.fault = "drop"
        if self.model.fault in ("deaf", "mute"):  # the second goes on saying that it is healthy
            threading.Event().wait()
        while self.model.fault == "spin":
            pass
        if self.model.fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": ')
            self.wfile.flush()
            threading.Event().wait()
        if self.model.fault in GARBLED:
            self.send(200, GARBLED[self.model.fault])
            return
        if self.broken():
            return
        try:
            self.send(200, json.dumps(self.model.answer(self.path, body)))
        except Refused as error:
            error_body = {"message": str(error), "type": "BadRequestError", "code": error.status}
            self.send(error.status, json.dumps({"error": error_body}))

    def broken(self) -> bool:
        """Break off in the middle of the exchange, or fail inside."""
        if self.model.fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        if self.model.fault == "500":
            self.send(500, "Internal Server Error")
        return self.model.fault in ("drop", "500")

    def send(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def serving(model: Model) -> Iterator[str]:
    """The base URL of a server that answers as the model, on the loopback interface."""
    server = Server(("127.0.0.1", 0), type("OfOneModel", (Handler,), {"model": model}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    """As a process: `model_server.py PORT [FAULT]`."""
    model = Model()
    model.fault = sys.argv[2] if len(sys.argv) > 2 else ""
    print("a line in the log", flush=True)
    handler = type("OfOneModel", (Handler,), {"model": model})
    Server(("127.0.0.1", int(sys.argv[1])), handler).serve_forever()


if __name__ == "__main__":
    main()
