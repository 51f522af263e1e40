"""Ollama, where it is installed: by its documentation, never run here.

Sources, for version 0.33: https://docs.ollama.com/faq (variables), https://docs.ollama.com/import,
`docs/api.md` (`/api/version`, `/api/blobs`, `/api/create`, `/api/show`),
https://docs.ollama.com/api/openai-compatibility (requests; no log-probabilities, prompts as text
only). It has no metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.servers.base import Launch

if TYPE_CHECKING:
    from quantize.measure.client import Client

NAME = "ollama"
ENVIRONMENT = None
PROGRAM = "ollama"
INSTALL = "install it as https://docs.ollama.com/linux says, so that ollama is on the PATH"
READS = "gguf"
START_SECONDS = 300.0
SCORER = None
COUNTERS = ()
KV_CACHE = None  # it is not said

SLOTS = 4
"""Each has a context of its own, as with llama.cpp."""

KNOWN_FAILURES = (
    (r"address already in use", "another program has taken the port: run the same again"),
    (r"requires more system memory", "lower serve.max_model_len"),
)


def command(launch: Launch) -> list[str]:
    """Start a server without a model; :meth:`OllamaClient.prepare` gives it one."""
    return [str(launch.program), "serve", *launch.serve.extra_args]


def variables(launch: Launch) -> dict[str, str]:
    """Where it listens, a folder of models of its own, and how many requests share the model."""
    return {
        "OLLAMA_HOST": f"127.0.0.1:{launch.port}",
        "OLLAMA_MODELS": str(launch.scratch / "ollama"),
        "OLLAMA_NUM_PARALLEL": str(min(launch.serve.max_num_seqs, SLOTS)),
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1",
    }


def client(base_url: str, model: str) -> Client:
    """See the protocol."""
    from quantize.measure.dialects import OllamaClient

    return OllamaClient(base_url, model)
