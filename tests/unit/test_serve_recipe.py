"""The recipe's block `serve`: which server goes with which format, and endpoints that are up."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.errors import RecipeError
from quantize.recipe import Recipe
from quantize.recipe_file import load_recipe

ENDPOINTS = """
serve:
  engine: url
  endpoints:
    baseline: {url: "http://10.0.0.7:8000/v1/", model: tiny}
    candidate: {url: "https://models.example/tiny", model: tiny-awq, api_key_variable: MY_KEY}
"""


def load(folder: Path, quantize: str, rest: str = "") -> Recipe:
    path = folder / "recipe.yaml"
    head = "version: 1\nname: example\nmodel: {source: owner/name}\n"
    path.write_text(f"{head}quantize: {quantize}\n{rest}")
    return load_recipe(path)


def refused(folder: Path, quantize: str, rest: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, quantize, rest)
    return str(caught.value)


RTN = "{method: rtn, scheme: W4A16}"


def test_the_server_follows_the_format(tmp_path: Path) -> None:
    assert load(tmp_path, RTN).serve.engine == "vllm"
    assert load(tmp_path, "{format: gguf}").serve.engine == "llamacpp"
    assert load(tmp_path, "{method: gguf}").serve.engine == "llamacpp"
    made = load(tmp_path, "{format: gguf}", "serve: {max_model_len: 512}\n")
    assert (made.serve.engine, made.serve.max_model_len) == ("llamacpp", 512)
    assert load(tmp_path, "{format: gguf}", "serve: {engine: ollama}").serve.engine == "ollama"


@pytest.mark.parametrize(
    ("quantize", "rest", "says"),
    [
        ("{format: gguf}", "serve: {engine: vllm}", "use serve.engine llamacpp, ollama, url"),
        (RTN, "serve: {engine: llamacpp}", "llama.cpp does not take compressed-tensors"),
        (RTN, "serve: {engine: ollama}", "use serve.engine vllm, sglang, tgi, url"),
        (RTN, "serve: {engine: url}", "engine url starts no server"),
        (RTN, "serve: {engine: sglang}", "environments: {sglang: {python: ...}}"),
        ("{format: gguf}", "serve: {tensor_parallel_size: 2, engine: llamacpp}", "set it to 1"),
        (RTN, ENDPOINTS.replace("engine: url", "engine: vllm"), "set engine to url"),
        (RTN, ENDPOINTS.replace("10.0.0.7", "me:secret@10.0.0.7"), "url"),
    ],
)
def test_what_does_not_go_together(quantize: str, rest: str, says: str, tmp_path: Path) -> None:
    assert says in refused(tmp_path, quantize, rest)


def test_endpoints(tmp_path: Path) -> None:
    serve = load(tmp_path, RTN, ENDPOINTS).serve
    assert serve.endpoints is not None
    assert serve.endpoints.baseline.base_url == "http://10.0.0.7:8000"
    assert serve.endpoints.candidate.base_url == "https://models.example/tiny"
    assert serve.secret_variables == {"MY_KEY"}


def test_an_adapter_that_stays_apart_is_vllms(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "version: 1\nname: example\n"
        "model: {source: a/b, adapter: c/d, adapter_mode: separate}\nquantize: {format: gguf}\n"
    )
    with pytest.raises(RecipeError, match="serves no adapter beside its base"):
        load_recipe(path)
