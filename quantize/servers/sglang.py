"""SGLang, in an environment that the user brings: written by its documentation, never run here.

Sources, for version 0.5.23: https://docs.sglang.io/advanced_features/server_arguments.html (flags),
https://docs.sglang.io/references/production_metrics.html (metrics),
`sglang/srt/entrypoints/http_server.py` of the released wheel (`/health`, `/tokenize`,
`/server_info`). It reads the format from config.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.servers.base import Launch

if TYPE_CHECKING:
    from quantize.measure.client import Client

NAME = "sglang"
ENVIRONMENT = "sglang"
PROGRAM = None
INSTALL = "pip install sglang, in an environment of its own: environments.sglang.python names it"
READS = "safetensors"
START_SECONDS = 1800.0
SCORER = None
COUNTERS = (
    "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total",
    "sglang:num_requests_total",
    "sglang:cached_tokens_total",
)
KV_CACHE = None  # its metrics have the share that is used, not the size

KNOWN_FAILURES = (
    (r"CUDA out of memory|Not enough memory", "lower serve.gpu_memory_utilization"),
    (r"[Aa]ddress already in use", "another program has taken the port: run the same again"),
)
"""(pattern in the log, remedy): the page "Server Arguments" names the first."""


def command(launch: Launch) -> list[str]:
    """Build the command line."""
    serve = launch.serve
    arguments = [str(launch.program), "-m", "sglang.launch_server"]
    arguments += ["--model-path", str(launch.model), "--served-model-name", launch.served_name]
    arguments += ["--host", "127.0.0.1", "--port", str(launch.port), "--enable-metrics"]
    arguments += ["--load-format", "safetensors", "--dtype", "bfloat16", "--random-seed", "0"]
    arguments += ["--max-running-requests", str(serve.max_num_seqs)]
    arguments += ["--mem-fraction-static", str(serve.gpu_memory_utilization)]
    arguments += ["--tensor-parallel-size", str(serve.tensor_parallel_size)]
    # Sampling defaults of the checkpoint would make greedy requests differ between tools.
    arguments += ["--sampling-defaults", "openai"]
    if launch.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if launch.tokenizer is not None:
        arguments += ["--tokenizer-path", str(launch.tokenizer)]
    if serve.max_model_len is not None:
        arguments += ["--context-length", str(serve.max_model_len)]
    if not serve.enable_prefix_caching:
        arguments += ["--disable-radix-cache"]
    return arguments + list(serve.extra_args)


def variables(launch: Launch) -> dict[str, str]:
    """Keep it offline."""
    return {"HF_HUB_OFFLINE": "1"}


def client(base_url: str, model: str) -> Client:
    """See the protocol."""
    from quantize.measure.dialects import SglangClient

    return SglangClient(base_url, model)
