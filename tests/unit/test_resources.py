from pathlib import Path

import pytest

from quantize.errors import SourceError, UsageError
from quantize.resources import (
    find_checkpoint,
    find_data,
    find_path,
    find_prompts,
    find_recipe,
    find_suite,
    is_hub_repository,
    shipped_names,
    shipped_root,
)


def test_shipped_root_is_the_checkout() -> None:
    assert (shipped_root() / "pyproject.toml").is_file()
    assert "tiny-llama-awq" in shipped_names("recipes")


@pytest.mark.parametrize(
    "text", ["tiny-llama-awq", "tiny-llama-awq.yaml", "recipes/tiny-llama-awq.yaml"]
)
def test_shipped_recipe_by_name(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(text) == shipped_root() / "recipes/tiny-llama-awq.yaml"


def test_own_file_goes_before_a_shipped_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-llama-awq").write_text("version: 1\n")
    assert find_recipe("tiny-llama-awq").resolve() == tmp_path / "tiny-llama-awq"


@pytest.mark.parametrize("text", ["tiny-lama-awq", "recipes/tiny-llama-awk.yaml", "tiny.yml"])
def test_unknown_recipe_names_the_nearest(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe(text)
    assert repr(text) in caught.value.message
    assert "tiny-llama-awq" in caught.value.hint


@pytest.mark.parametrize("text", ["", ".", "x" * 5000, "a\0b", "~nobody-at-all/x", "/etc/shadow/x"])
def test_odd_names_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        find_recipe(text)


def test_suites_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\n")
    assert find_suite("mine.yaml", tmp_path) == tmp_path / "mine.yaml"
    assert find_suite("tiny", tmp_path) == shipped_root() / "eval/suites/tiny.yaml"
    assert find_prompts("default", tmp_path) == shipped_root() / "eval/prompts/default.yaml"
    with pytest.raises(UsageError, match="no prompts 'defualt'") as caught:
        find_prompts("defualt", tmp_path)
    assert "default" in caught.value.hint


def test_paths_start_at_the_folder_then_at_the_shipped_root(tmp_path: Path) -> None:
    shipped = shipped_root() / "examples/tiny_llama/calibration.jsonl"
    name = "examples/tiny_llama/calibration.jsonl"
    assert find_path(name, tmp_path) == shipped
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("{}\n")
    assert find_path(name, tmp_path) == own
    assert find_path(str(shipped), tmp_path) == shipped


def test_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("text")
    assert find_checkpoint("model", tmp_path) == tmp_path / "model"
    assert find_checkpoint("./model", tmp_path) == tmp_path / "model"
    assert find_checkpoint("meta-llama/Llama-3.1-8B-Instruct", tmp_path) is None
    with pytest.raises(SourceError, match="is a file, not a folder"):
        find_checkpoint("file", tmp_path)


@pytest.mark.parametrize(
    "text", ["./owner/name", "~/name", "/owner/name", "a/b/c", "name", "../name", "owner/", "a\0/b"]
)
def test_what_cannot_be_a_repository_must_exist(text: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        find_checkpoint(text, tmp_path)
    assert "model.source" in caught.value.message
    assert repr(text) in caught.value.message


def test_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert find_data("rows.jsonl", tmp_path, "calibration.source") == tmp_path / "rows.jsonl"
    assert find_data("HuggingFaceH4/ultrachat_200k", tmp_path, "calibration.source") is None
    # a misspelt file is not a data set of the owner `data`
    with pytest.raises(SourceError, match=r"no file 'data/rowz\.jsonl'"):
        find_data("data/rowz.jsonl", tmp_path, "calibration.source")
    with pytest.raises(SourceError, match="is a folder, not a file"):
        find_data(".", tmp_path, "calibration.source")


def test_repository_names() -> None:
    assert is_hub_repository("Qwen/Qwen3-4B-Instruct-2507")
    assert not is_hub_repository("a/..")
    assert not is_hub_repository("a/b/c")
