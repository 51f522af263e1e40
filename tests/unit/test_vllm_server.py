"""vLLM's command line, and what its logs say; the words are those of vLLM 0.32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize.servers import SERVERS, cannot_serve, vllm
from quantize.servers.base import Launch, explain, kv_cache_tokens
from quantize.serving import Serve


def launch(accelerator: str = "cpu", **serve: Any) -> Launch:
    return Launch(
        program=Path("/envs/vllm/bin/python"),
        model=Path("/models/a b"),
        served_name="model",
        port=8123,
        accelerator=accelerator,
        serve=Serve(**serve),
        max_logprobs=20,
    )


def options(made: Launch) -> dict[str, str]:
    """The command's options with their values; flags have none."""
    words = vllm.command(made)
    assert words[:3] == [str(made.program), "-m", "vllm.entrypoints.openai.api_server"]
    found: dict[str, str] = {}
    for word in words[3:]:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            found[word] = ""
        else:
            assert found[list(found)[-1]] == ""
            found[list(found)[-1]] = word
    return found


COMMON = {
    "--model": "/models/a b",  # one word: no shell takes it apart
    "--served-model-name": "model",
    "--host": "127.0.0.1",  # and no other machine's
    "--port": "8123",
    "--load-format": "safetensors",
    "--dtype": "bfloat16",
    "--max-logprobs": "20",
    "--max-num-seqs": "64",
    "--tensor-parallel-size": "1",
    "--generation-config": "vllm",
    "--enable-prefix-caching": "",
}


def test_on_a_cpu() -> None:
    assert options(launch()) == COMMON | {"--enforce-eager": ""}
    given = vllm.variables(launch(kv_cache_gib=3))
    assert given["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert given["HF_HUB_OFFLINE"] == "1"


def test_on_a_gpu() -> None:
    made = launch("cuda", gpu_memory_utilization=0.8)
    assert options(made) == COMMON | {"--gpu-memory-utilization": "0.8"}
    assert "VLLM_CPU_KVCACHE_SPACE" not in vllm.variables(made)


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        ({"max_model_len": 1024}, {"--max-model-len": "1024"}),
        ({"max_num_seqs": 7}, {"--max-num-seqs": "7"}),
        ({"tensor_parallel_size": 4}, {"--tensor-parallel-size": "4"}),
        ({"enable_prefix_caching": False}, {"--no-enable-prefix-caching": ""}),
        ({"extra_args": ("--swap-space", "0")}, {"--swap-space": "0"}),
    ],
)
def test_keys_of_the_recipe_reach_the_command(
    serve: dict[str, Any], expected: dict[str, str]
) -> None:
    found = options(launch("cuda", **serve))
    assert found.items() >= expected.items()
    assert ("--enable-prefix-caching" in found) != ("--no-enable-prefix-caching" in found)


def test_what_is_typed_comes_last() -> None:
    """So that it wins."""
    made = launch(extra_args=("--dtype", "float32"))
    assert vllm.command(made)[-2:] == ["--dtype", "float32"]
    assert replace(made, serve=Serve()) == launch()


def test_another_checkpoints_tokenizer() -> None:
    made = replace(launch(), tokenizer=Path("/models/fine tune"))
    assert options(made)["--tokenizer"] == "/models/fine tune"
    assert "--tokenizer" not in options(launch())


# --- what this machine lacks ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["compressed-tensors", "awq", "gptq"])
def test_four_bits_need_avx512_on_a_cpu(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.servers.cpu_has", lambda _flag: False)
    assert "AVX-512" in str(cannot_serve("vllm", form, "W4A16", "cpu"))
    assert cannot_serve("vllm", form, "W4A16", "cuda") is None
    assert cannot_serve("vllm", "compressed-tensors", "FP8_DYNAMIC", "cpu") is None
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
    assert cannot_serve("vllm", form, "W4A16", "cpu") is None


# --- logs -----------------------------------------------------------------------------------------

LINE = "(EngineCore pid=7) ERROR 11-20 17:31:10 [core.py:1] "


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
            "total capacity of 23.65 GiB",
            "serve.gpu_memory_utilization",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine",
            "raise serve.gpu_memory_utilization (CPU: serve.kv_cache_gib)",
        ),
        (
            "ValueError: To serve at least one request with the model's max seq len (131072), "
            "(16.0 GiB KV cache is needed, which is larger than the available KV cache memory "
            "(1.0 GiB). Based on the available memory, the estimated maximum model length is 8192.",
            "lower serve.max_model_len",
        ),
        (
            "User-specified max_model_len (4096) is greater than the derived max_model_len "
            "(max_position_embeddings=2048",
            "the checkpoint's own context length",
        ),
        (
            "Total number of attention heads (4) must be divisible by tensor parallel size (3).",
            "serve.tensor_parallel_size",
        ),
        (
            "Free memory on device cuda:0 (3.1/23.65 GiB) on startup is less than desired GPU "
            "memory utilization (0.9, 21.28 GiB).",
            "another process holds the GPU",
        ),
        ("OSError: [Errno 98] Address already in use", "run the same command again"),
        (
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core "
            "proc(s): {'EngineCore': -9}",
            "was killed (SIGKILL)",
        ),
        (
            "(EngineCore pid=3) ERROR 11-27 11:33:01 [multiproc_executor.py:315] Worker proc "
            "VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
            "was killed (SIGKILL)",
        ),
        (
            "(EngineCore pid=3) Exception: WorkerProc initialization failed due to an exception "
            "in a background process. See stack trace for root cause.",
            "was killed (SIGKILL)",
        ),
        (
            "(Worker pid=4) ERROR [multiproc_executor.py:863] WorkerProc failed to start.\n"
            "(EngineCore pid=3) Exception: WorkerProc initialization failed due to an exception "
            "in a background process. See stack trace for root cause.",
            None,
        ),
        ("Failed core proc(s): {'EngineCore': 1}", None),
        ("RuntimeError: something that nobody foresaw", None),
        ("INFO CPU KV cache size: 524,288 tokens, Maximum concurrency 512.00x", None),
    ],
)
def test_remedies(message: str, remedy: str | None) -> None:
    found = explain(SERVERS["vllm"], f"{LINE}starting\n{LINE}{message}\n{LINE}shutting down\n")
    if remedy is None:
        assert found is None
    else:
        assert found is not None
        assert found[0].endswith(message[-300:]) and "\n" not in found[0]
        assert remedy in found[1]


@pytest.mark.parametrize(
    ("log", "tokens"),
    [
        (LINE + "CPU KV cache size: 1,048,576 tokens, Maximum concurrency for 1,024", 1_048_576),
        (LINE + "GPU KV cache size: 976 tokens, Maximum concurrency", 976),
        (LINE + "no such line", None),
        ("", None),
    ],
)
def test_size_of_the_kv_cache(log: str, tokens: int | None) -> None:
    assert kv_cache_tokens(SERVERS["vllm"], log) == tokens
