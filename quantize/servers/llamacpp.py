"""llama.cpp's server, from the environment that quantizes to GGUF: one build for all of it.

Flags and answers are those of `tools/server/README.md` in the source distribution of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import ResourceError
from quantize.servers.base import Launch, gguf_file

if TYPE_CHECKING:
    from quantize.measure.client import Client

NAME = "llamacpp"
ENVIRONMENT = "llamacpp"
PROGRAM = None
INSTALL = "quantize setup builds it"
READS = "gguf"
START_SECONDS = 900.0  # a large file from a network disk, and the warm-up
SCORER = "llamacpp_score"
COUNTERS = (
    "llamacpp:prompt_tokens_total",
    "llamacpp:tokens_predicted_total",
    "llamacpp:n_decode_total",
)

SLOTS = 4
"""Requests decoded together at most, as llama-server itself chooses. Each has a context of its own,
whose memory is taken when the server starts: 64 of them, vLLM's number, would be 64 times that."""

EXECUTABLE = "llama-server"
KV_CACHE = r"n_slots = (\d+), n_ctx_slot = (\d+)"
"""The start-up line `n_slots = 4, n_ctx_slot = 1024`; each slot has its own part."""

KNOWN_FAILURES = (
    (r"failed to open GGUF file|invalid magic characters", "make the GGUF artifact again"),
    (r"model is corrupted or incomplete", "the GGUF file is cut off: make the artifact again"),
    (r"unknown model architecture", "this llama.cpp does not know it: use format awq or gptq"),
    (
        r"failed to allocate (CPU )?buffer|cudaMalloc failed: out of memory",
        "lower serve.max_model_len or serve.max_num_seqs",
    ),
    (
        r"couldn't bind HTTP server socket",
        "another program has taken the port: run the same command again",
    ),
    (r"error: invalid argument", "correct serve.extra_args: this llama-server has no such flag"),
)
"""(pattern in the log, remedy), with the words of this llama.cpp."""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep. libgomp lets them spin otherwise, and where others used
the cores, too, a token took a second instead of a millisecond."""


def command(launch: Launch) -> list[str]:
    """Build the command line; `--ctx-size` is of all slots together."""
    serve, slots = launch.serve, slots_of(launch)
    arguments = [str(executable(launch.program)), "--model", str(gguf_file(launch.model))]
    arguments += ["--alias", launch.served_name]
    arguments += ["--host", "127.0.0.1", "--port", str(launch.port), "--offline", "--no-webui"]
    arguments += ["--jinja", "--metrics", "--seed", "0"]
    arguments += ["--parallel", str(slots), "--no-kv-unified"]
    # 0 is the model's own length, cut into as many parts as there are slots
    arguments += ["--ctx-size", str((launch.context_tokens or 0) * slots)]
    caching = "cache-prompt" if serve.enable_prefix_caching else "no-cache-prompt"
    arguments += [f"--{caching}"]
    if launch.accelerator == "cuda":
        arguments += ["--n-gpu-layers", "all"]
    else:
        threads = str(len(os.sched_getaffinity(0)))
        arguments += ["--n-gpu-layers", "0", "--threads", threads, "--threads-batch", threads]
    return arguments + list(serve.extra_args)


def slots_of(launch: Launch) -> int:
    """Requests decoded together; one where nobody knows how long a context is."""
    return min(launch.serve.max_num_seqs, SLOTS) if launch.context_tokens else 1


def executable(python: Path) -> Path:
    """The server beside the interpreter of its environment, where the build puts it."""
    path = python.parent / EXECUTABLE
    if not os.access(path, os.X_OK):
        raise ResourceError(
            f"{path} is not there: the environment has llama-cpp-python without its programs",
            "remove environments.llamacpp from the recipe, so that quantize builds its own",
        )
    return path


def variables(launch: Launch) -> dict[str, str]:
    """See `PASSIVE`; the executables know where their libraries are."""
    return PASSIVE


def client(base_url: str, model: str) -> Client:
    """See the protocol."""
    from quantize.measure.dialects import LlamaCppClient

    return LlamaCppClient(base_url, model)
