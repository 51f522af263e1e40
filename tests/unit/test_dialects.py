"""How other servers than vLLM are asked: small HTTP servers with the answers that those give.

llama-server's answers are copied from one that ran; Ollama's, TGI's and SGLang's from their
documentation, which is all that is known of them here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from model_server import Model, serving

from quantize.errors import CredentialsError, ResourceError
from quantize.measure.dialects import LlamaCppClient, OllamaClient, OpenAIClient, TgiClient
from quantize.servers import url as endpoints
from quantize.serving import Endpoint

Answers = Mapping[str, Any]


class Said(ThreadingHTTPServer):
    """Answers by path, and remembers what it was asked."""

    daemon_threads = True
    answers: Answers
    asked: list[tuple[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Said
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.reply(body)
        else:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        self.server.asked.append((self.path, body))
        status = 200 if self.path in self.server.answers else 404
        content = json.dumps(self.server.answers.get(self.path, {"error": "none"})).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def saying(answers: Answers) -> Iterator[tuple[str, Said]]:
    server = Said(("127.0.0.1", 0), Handler)
    server.answers, server.asked = answers, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


LLAMA: Answers = {
    "/health": {"status": "ok"},
    "/props": {
        "default_generation_settings": {"params": {"seed": 0}, "n_ctx": 1024},
        "total_slots": 4,
        "build_info": "b1-0c1e570",
    },
    "/tokenize": {"tokens": [1, 622, 423, 291, 6]},
    "/apply-template": {"prompt": "<|user|>hi<|end|><|assistant|>"},
    "/completion": {
        "content": "rabbit",
        "tokens": [314, 786, 6],
        "stop_type": "eos",
        "completion_probabilities": [{"id": 314, "token": "ra", "logprob": -1.098}],
    },
    "/v1/completions": {
        "choices": [{"text": " is here.", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 8, "prompt_tokens": 4, "total_tokens": 12},
    },
}


def test_llama_server() -> None:
    with saying(LLAMA) as (base, server):
        client = LlamaCppClient(base, "model")
        assert client.healthy()
        assert client.version() == "b1-0c1e570"
        assert (client.max_model_len(), client.slots()) == (1024, 4)
        assert client.tokenize("The heron<|end|>", special=True) == [1, 622, 423, 291, 6]
        assert server.asked[-1][1]["parse_special"] is True
        assert server.asked[-1][1]["add_special"] is True
        client.tokenize_chat([{"role": "user", "content": "hi"}])
        assert server.asked[-1][1]["content"] == "<|user|>hi<|end|><|assistant|>"
        assert client.go_on([1, 622], 16) == ([314, 786], -1.098)  # what ends it is no text
        assert server.asked[-1][1]["cache_prompt"] is False
        answer = client.complete("The heron", 8)
        assert (answer.text, answer.completion_tokens) == (" is here.", 8)
        limits = client.limits()
        assert "log-probabilities" in str(limits.scores)
        assert limits.tokens is None
        assert limits.tasks is None
        client.close()


def test_a_schema_outside_of_chats_has_another_name_there() -> None:
    with saying(LLAMA) as (base, server):
        client = LlamaCppClient(base, "model")
        form = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "null"}},
        }
        client.complete("a", 8, response_format=form)
        assert server.asked[-1][1]["json_schema"] == {"type": "null"}
        assert "response_format" not in server.asked[-1][1]
        client.close()


def test_tgi() -> None:
    info = {"model_id": "/model", "max_total_tokens": 2048, "version": "3.3.7"}
    with saying({"/health": {}, "/info": info}) as (base, _):
        client = TgiClient(base, "model")
        assert client.healthy()
        assert (client.version(), client.max_model_len()) == ("3.3.7", 2048)
        assert "documentation only" in str(client.limits().tasks)
        client.close()


def test_ollama_is_given_its_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" * 1000)
    with saying({"/api/version": {"version": "0.33.0"}}) as (base, server):
        client = OllamaClient(base, "model")
        assert client.healthy()
        assert client.version() == "0.33.0"

        digest = f"sha256:{sha256(b'GGUF' * 1000).hexdigest()}"
        server.answers = {
            f"/api/blobs/{digest}": {},
            "/api/create": {"status": "success"},
            "/api/show": {"parameters": "num_ctx                        1024"},
        }
        client.prepare(tmp_path, 1024)
        (blob, content), (create, body) = server.asked[-2:]
        assert (blob, content) == (f"/api/blobs/{digest}", b"GGUF" * 1000)
        assert create == "/api/create"
        assert body["files"] == {"tiny.gguf": digest}
        assert body["parameters"] == {"num_ctx": 1024}
        assert client.max_model_len() == 1024
        client.close()


# --- endpoints that are up ------------------------------------------------------------------------


def endpoint(base: str, **keys: Any) -> Endpoint:
    return Endpoint(url=base, model="model", **keys)


def test_an_endpoint_that_speaks_as_vllm_does() -> None:
    model = Model()
    with serving(model) as base:
        client = endpoints.connect(endpoint(f"{base}/v1"), None)
        assert client.version() == "0.32.0"
        assert client.max_model_len() == 512
        limits = client.limits()
        assert (limits.tokens, limits.scores, limits.choices, limits.tasks) == (None,) * 4
        asked = len(model.requests)
        assert client.limits() is limits
        assert len(model.requests) == asked  # once
        client.close()


def test_an_endpoint_that_answers_in_text_alone() -> None:
    models = {"data": [{"id": "model"}, {"id": "another"}]}
    with saying({"/v1/models": models}) as (base, _):
        client = endpoints.connect(endpoint(base), 4096)
        assert client.healthy()
        assert client.version() == "not said"
        assert client.max_model_len() == 4096
        limits = client.limits()
        assert "/tokenize answered 404" in str(limits.tokens)
        assert "/v1/completions answered 404" in str(limits.scores)
        assert limits.tasks is not None
        with pytest.raises(ResourceError, match="how long its context is") as caught:
            endpoints.connect(endpoint(base), None).max_model_len()
        assert "serve.max_model_len" in caught.value.hint
        client.close()


def test_an_endpoint_with_another_model() -> None:
    with (
        saying({"/v1/models": {"data": [{"id": "another"}]}}) as (base, _),
        pytest.raises(ResourceError, match="serves another, and not model"),
    ):
        endpoints.connect(endpoint(base), None)


def test_the_key_is_sent_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(CredentialsError, match="A_KEY is not set"):
        endpoints.connect(endpoint("http://127.0.0.1:1", api_key_variable="A_KEY"), None)
    client = OpenAIClient("http://127.0.0.1:1", "model", api_key="secret")
    assert client._http.headers["Authorization"] == "Bearer secret"
    client.close()
