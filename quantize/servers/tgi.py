"""Hugging Face's Text Generation Inference, where it is installed: by its documentation, never run.

Sources, for version 3.3.7, the last but for maintenance:
https://huggingface.co/docs/text-generation-inference/reference/launcher (flags),
https://huggingface.co/docs/text-generation-inference/reference/metrics (metrics),
`router/src/server.rs` (`/health`, `/info`). It reads the format from config.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.servers.base import Launch

if TYPE_CHECKING:
    from quantize.measure.client import Client

NAME = "tgi"
ENVIRONMENT = None
PROGRAM = "text-generation-launcher"
INSTALL = (
    "install it as https://github.com/huggingface/text-generation-inference says under Local "
    "install, so that text-generation-launcher is on the PATH"
)
READS = "safetensors"
START_SECONDS = 1800.0
SCORER = None
COUNTERS = ("tgi_request_count", "tgi_request_success")

KNOWN_FAILURES = (
    (r"CUDA out of memory", "lower serve.gpu_memory_utilization or serve.max_model_len"),
    (r"[Aa]ddress already in use", "another program has taken the port: run the same again"),
)


def command(launch: Launch) -> list[str]:
    """Build the command line; `--dtype` cannot stand beside a quantization."""
    serve = launch.serve
    arguments = [str(launch.program), "--model-id", str(launch.model)]
    arguments += ["--hostname", "127.0.0.1", "--port", str(launch.port)]
    arguments += ["--max-concurrent-requests", str(2 * serve.max_num_seqs)]
    arguments += ["--max-batch-size", str(serve.max_num_seqs)]
    arguments += ["--num-shard", str(serve.tensor_parallel_size)]
    arguments += ["--cuda-memory-fraction", str(serve.gpu_memory_utilization)]
    arguments += ["--usage-stats", "off"]
    if launch.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if serve.max_model_len is not None:
        longest = serve.max_model_len
        arguments += ["--max-input-tokens", str(longest - 1), "--max-total-tokens", str(longest)]
    return arguments + list(serve.extra_args)


def variables(launch: Launch) -> dict[str, str]:
    """Keep it offline; without a cache of prefixes where the recipe says so."""
    caching = {} if launch.serve.enable_prefix_caching else {"PREFIX_CACHING": "0"}
    return {"HF_HUB_OFFLINE": "1", **caching}


def client(base_url: str, model: str) -> Client:
    """See the protocol."""
    from quantize.measure.dialects import TgiClient

    return TgiClient(base_url, model)
