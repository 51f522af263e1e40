"""llama-server's command line, and what its logs say; the lines are those that it wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import ResourceError, SourceError
from quantize.servers import SERVERS, llamacpp
from quantize.servers.base import Launch, explain, kv_cache_tokens
from quantize.serving import Serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-server"
    program.touch(0o755)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny-Q4_K_M.gguf").touch()
    return tmp_path


def launch(
    folder: Path, context: int | None = 1024, accelerator: str = "cpu", **serve: Any
) -> Launch:
    return Launch(
        program=folder / "bin" / "python",
        model=folder / "model",
        served_name="model",
        port=8123,
        accelerator=accelerator,
        serve=Serve(engine="llamacpp", **serve),
        max_logprobs=20,
        context_tokens=context,
    )


def option(words: list[str], name: str) -> str:
    assert words.count(name) == 1
    return words[words.index(name) + 1]


def test_the_command(folder: Path) -> None:
    words = llamacpp.command(launch(folder))
    assert words[0] == str(folder / "bin" / "llama-server")
    assert option(words, "--model") == str(folder / "model" / "tiny-Q4_K_M.gguf")
    assert option(words, "--host") == "127.0.0.1"  # and no other machine's
    assert option(words, "--port") == "8123"
    assert option(words, "--alias") == "model"
    assert {"--offline", "--no-webui", "--jinja", "--metrics", "--cache-prompt"} <= set(words)
    assert option(words, "--threads") == str(len(os.sched_getaffinity(0)))
    assert option(words, "--n-gpu-layers") == "0"
    assert option(llamacpp.command(launch(folder, accelerator="cuda")), "--n-gpu-layers") == "all"
    assert llamacpp.variables(launch(folder)) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("context", "max_num_seqs", "slots", "size"),
    [
        (1024, 64, 4, 4096),  # four at most, each with the whole length
        (1024, 2, 2, 2048),
        (8192, 1, 1, 8192),
        (None, 64, 1, 0),  # the model's own, which nobody else may have a part of
    ],
)
def test_slots_do_not_share_a_context(
    context: int | None, max_num_seqs: int, slots: int, size: int, folder: Path
) -> None:
    words = llamacpp.command(launch(folder, context, max_num_seqs=max_num_seqs))
    assert option(words, "--parallel") == str(slots)
    assert option(words, "--ctx-size") == str(size)
    assert "--no-kv-unified" in words


def test_what_is_typed_comes_last(folder: Path) -> None:
    words = llamacpp.command(
        launch(folder, enable_prefix_caching=False, extra_args=("--threads", "1"))
    )
    assert words[-2:] == ["--threads", "1"]
    assert "--no-cache-prompt" in words
    assert "--cache-prompt" not in words


def test_a_folder_without_one_file(folder: Path) -> None:
    (folder / "model" / "imatrix.gguf").touch()  # holds no weights
    llamacpp.command(launch(folder))
    (folder / "model" / "another.gguf").touch()
    with pytest.raises(SourceError, match=r"exactly one \.gguf file: another.gguf, tiny-Q4_K_M"):
        llamacpp.command(launch(folder))


def test_an_environment_without_the_program(folder: Path) -> None:
    (folder / "bin" / "llama-server").unlink()
    with pytest.raises(ResourceError, match="llama-server is not there") as caught:
        llamacpp.command(launch(folder))
    assert "environments.llamacpp" in caught.value.hint


ENDS = (
    "0.00.067.965 I srv    operator(): operator(): cleaning up before exit...\n"
    "0.00.163.808 E srv  llama_server: exiting due to model loading error\n"
)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (
            "E gguf_init_from_file: failed to open GGUF file 'a.gguf' (No such file or directory)",
            "make the GGUF artifact again",
        ),
        (
            "E gguf_init_from_reader: invalid magic characters: '[@?d', expected 'GGUF'",
            "make the GGUF artifact again",
        ),
        (
            "E llama_model_load: error loading model: tensor 'output.weight' data is not within "
            "the file bounds, model is corrupted or incomplete",
            "cut off",
        ),
        (
            "E llama_model_load: error loading model: unknown model architecture: 'xlama'",
            "does not know it",
        ),
        (
            "E llama_init_from_model: failed to initialize the context: failed to allocate buffer "
            "for kv cache",
            "serve.max_model_len",
        ),
        (
            "E alloc_tensor_range: failed to allocate CPU buffer of size 8193572864",
            "serve.max_model_len",
        ),
        (
            "E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 812",
            "run the same command again",
        ),
        ("error: invalid argument: --bogus", "serve.extra_args"),
        ("E something that nobody foresaw", None),
    ],
)
def test_remedies(line: str, remedy: str | None) -> None:
    found = explain(SERVERS["llamacpp"], f"0.00.057.941 {line}\n{ENDS}")
    if remedy is None:
        assert found is None
    else:
        assert found is not None
        assert found[0].endswith(line) and remedy in found[1]


def test_size_of_the_kv_cache() -> None:
    log = (
        "0.04.792.302 I srv    load_model: initializing, n_slots = 4, n_ctx_slot = 1024, "
        "kv_unified = 'false'\n0.04.931.164 I srv  llama_server: model loaded\n"
    )
    assert kv_cache_tokens(SERVERS["llamacpp"], log) == 4096
    assert kv_cache_tokens(SERVERS["llamacpp"], "") is None
