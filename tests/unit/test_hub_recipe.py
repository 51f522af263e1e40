"""The `publish.hub` block: names by the Hub's and git's rules, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.errors import RecipeError
from quantize.recipe_file import load_recipe
from quantize.targets import Hub

RECIPE = """\
version: 1
name: tiny
model:
  source: acme/tiny
quantize:
  method: rtn
publish:
  hub:
    repo: acme/tiny-awq
"""


def load(folder: Path, *lines: str) -> Hub:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + "".join(f"    {line}\n" for line in lines))
    hub = load_recipe(path).publish.hub
    assert hub is not None
    return hub


def test_all_keys(tmp_path: Path) -> None:
    hub = load(
        tmp_path,
        "private: false",
        "allow_public: true",
        "branch: dev/quantized",
        "tag: v1.0-awq",
        "collection: acme/small-models-0123456789abcdef01234567",
    )
    assert (hub.branch, hub.tag, hub.private) == ("dev/quantized", "v1.0-awq", False)
    assert load(tmp_path, "pull_request: true").pull_request


@pytest.mark.parametrize(
    "repo",
    [
        "acme/a--b",
        "acme/a..b",
        "acme/model.git",
        "acme/-a",
        "acme/a.",
        "acme/" + "a" * 97,
        "a b/c",
        "acme",
        "a/b/c",
        "acme/modèle",
    ],
)
def test_repository_names_that_the_hub_refuses(tmp_path: Path, repo: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("acme/tiny-awq", repo), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    [problem] = caught.value.problems
    assert (problem.line, problem.path) == (9, "publish.hub.repo")
    assert repo in problem.message


@pytest.mark.parametrize("key", ["branch", "tag"])
@pytest.mark.parametrize(
    "name",
    [
        "a..b",
        "a b",
        "-v1",
        "v1.lock",
        "a//b",
        "a/",
        "/a",
        "v1.",
        "a~1",
        "a^",
        "a:b",
        "refs/pr/1",
        ".a",
        "a/.b",
        "a@{1}",
        "@",
        "0" * 40,
        "x" * 201,
    ],
)
def test_names_that_git_refuses(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"{key}: '{name}'")
    [problem] = caught.value.problems
    assert problem.path == f"publish.hub.{key}"
    assert problem.line == 10


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["pull_request: true", "tag: v1"], "remove one of them"),
        (["pull_request: true", "branch: dev"], "a pull request goes to main"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, *lines)
