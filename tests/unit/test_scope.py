"""What each measure stage asks of its server, and how much at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.keys import digest
from quantize.measure.client import MAX_CONNECTIONS
from quantize.measure.scope import Scope, quick_subset, scope
from quantize.measure.serving import TASK_TOKENS, concurrency, longest_request
from quantize.recipe_file import load_recipe, load_suite
from quantize.resolve import resolve
from quantize.resources import shipped_names, shipped_root
from quantize.stages.base import Resolved
from quantize.stages.measure import (
    asks_base,
    embedding_rows,
    environments,
    key_inputs,
    largest_token_id,
)

TINY = shipped_root() / "examples" / "tiny_llama"
VALLEY = "evaluate.text={text: ../eval/texts/valley.jsonl}"


def resolved(cache: Path, *changes: str) -> Resolved:
    path = shipped_root() / "recipes" / "tiny-llama-fp8.yaml"
    return resolve(load_recipe(path, changes), path, "cpu", online=False, cache_path=cache)


def asked(cache: Path, stage: str, *changes: str) -> Scope:
    return scope(resolved(cache, *changes), f"measure-{stage}")


def test_parts_by_stage(hash_cache: Path) -> None:
    def parts(stage: str) -> tuple[bool, ...]:
        found = asked(hash_cache, stage, VALLEY)
        return (
            found.everything,
            found.perplexity is not None,
            found.own_text is not None,
            bool(found.suite.tasks),
            found.again,
            found.foreign_tokenizer,
        )

    assert parts("baseline") == parts("candidate") == (True, True, True, True, False, False)
    assert parts("repeat") == (False, True, True, True, True, False)
    assert parts("base") == (False, False, False, True, False, True)


def test_keys_say_what_is_asked(hash_cache: Path) -> None:
    with_text = resolved(hash_cache, VALLEY)

    def keys(stage: str) -> set[str]:
        return set(key_inputs(with_text, f"measure-{stage}"))

    texts = {"text", "own_text", "own_text_from"}
    everywhere = {"suite", "tasks", "quick", "serve", "accelerator"}
    assert keys("baseline") == keys("candidate") == everywhere | texts | {"prompts", "health"}
    assert keys("repeat") == everywhere | texts | {"again"}
    assert keys("base") == everywhere
    assert key_inputs(with_text, "measure-repeat")["again"] == 1
    quick = resolved(hash_cache, "evaluate.quick=true")
    assert key_inputs(quick, "measure-baseline")["quick"] is True


def test_the_endpoint_that_is_asked_is_in_the_key(hash_cache: Path) -> None:
    """Its address and model, and not the name of the variable with its key."""
    baseline = "{url: 'http://a:1/v1', model: x}"
    candidate = "{url: 'http://b:2', model: z, api_key_variable: KEY}"
    ends = f"{{baseline: {baseline}, candidate: {candidate}}}"
    given = resolved(hash_cache, f"serve={{engine: url, endpoints: {ends}}}")
    keys = {
        stage: key_inputs(given, f"measure-{stage}")["serve"]
        for stage in ("baseline", "candidate", "repeat")
    }
    assert keys["baseline"]["endpoint"] == {"url": digest("http://a:1"), "model": "x"}
    assert keys["candidate"]["endpoint"] == {"url": digest("http://b:2"), "model": "z"}
    assert keys["repeat"] == keys["baseline"]
    assert "KEY" not in str(keys)
    assert "http" not in str(keys)  # what a key is made of is published
    assert environments(given, "measure-baseline") == ("lmeval",)
    assert (asks_base(given), asks_base(resolved(hash_cache))) == (False, True)
    assert "endpoint" not in key_inputs(resolved(hash_cache), "measure-baseline")["serve"]


def test_text_from_the_hub_needs_the_environment_that_downloads(hash_cache: Path) -> None:
    alone = ("evaluate.suite=perplexity",)
    assert environments(resolved(hash_cache, *alone), "measure-baseline") == ("vllm",)
    hub = (*alone, "evaluate.text={text: some/text, revision: " + "a" * 40 + "}")
    assert environments(resolved(hash_cache, *hub), "measure-baseline") == ("vllm", "lmeval")


def test_own_text_is_cut_as_the_suites(hash_cache: Path) -> None:
    found = asked(
        hash_cache, "baseline", "evaluate.text={text: ../eval/texts/valley.jsonl, field: text}"
    )
    suite, own = found.suite.perplexity, found.own_text
    assert suite is not None
    assert own is not None
    assert (own.window, own.stride, own.top_k) == (suite.window, suite.stride, suite.top_k)
    assert (own.text, own.join, own.windows) == ("../eval/texts/valley.jsonl", False, None)
    quick = asked(hash_cache, "baseline", VALLEY, "evaluate.quick=true").own_text
    assert quick is not None
    assert quick.windows == found.suite.quick.windows


def test_the_quick_subset(hash_cache: Path) -> None:
    whole, quick = (
        asked(hash_cache, "baseline"),
        asked(hash_cache, "baseline", "evaluate.quick=true"),
    )
    limits = whole.suite.quick
    assert quick.suite.perplexity is not None
    assert quick.suite.perplexity.windows == limits.windows
    assert [task.limit for task in quick.suite.tasks] == [limits.documents] * 2
    assert (whole.health_prompts, quick.health_prompts) == (None, limits.health_prompts)
    assert (whole.quick, quick.quick) == (False, True)


@pytest.mark.parametrize("name", shipped_names("eval/suites"))
def test_a_subset_is_never_larger(name: str) -> None:
    suite = load_suite(shipped_root() / "eval" / "suites" / f"{name}.yaml")
    quick = quick_subset(suite)
    assert [task.name for task in quick.tasks] == [task.name for task in suite.tasks]
    for small, large in zip(quick.tasks, suite.tasks, strict=True):
        assert small.limit is not None
        assert small.limit <= min(large.limit or small.limit, suite.quick.documents)
    if suite.perplexity is not None and quick.perplexity is not None:
        assert quick.perplexity.windows == min(
            suite.perplexity.windows or suite.quick.windows, suite.quick.windows
        )
    assert quick_subset(quick) == quick


# --- the base model -----------------------------------------------------------------------------


def test_token_ids_and_embedding_rows() -> None:
    rows = embedding_rows(TINY / "base")
    assert 0 < largest_token_id(TINY / "instruct") < rows
    config = json.loads((TINY / "base" / "config.json").read_text())
    assert rows == config["vocab_size"]


def test_a_token_that_was_added_counts(tmp_path: Path) -> None:
    tokenizer = json.loads((TINY / "instruct" / "tokenizer.json").read_text())
    largest = largest_token_id(TINY / "instruct")
    tokenizer["added_tokens"].append({"id": largest + 1, "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert largest_token_id(tmp_path) == largest + 1
    pieces = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}  # Unigram
    (tmp_path / "tokenizer.json").write_text(json.dumps(pieces))
    assert largest_token_id(tmp_path) == 1


# --- keeping the server full --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "cache", "longest", "expected"),
    [
        (64, 1_000_000, 2048, 128),  # as many again wait
        (64, 40 * 2048, 2048, 80),  # the cache holds 40 of the longest
        (64, 10 * 2048, 2048, 64),  # short requests may fill the slots all the same
        (64, None, 2048, 64),
        (8, 1_000_000, 2048, 16),
        (512, 10_000_000, 2048, MAX_CONNECTIONS),
        (1, 0, 2048, 1),
    ],
)
def test_concurrency(slots: int, cache: int | None, longest: int, expected: int) -> None:
    assert concurrency(slots, cache, longest) == expected


def test_the_longest_request(hash_cache: Path) -> None:
    assert longest_request(asked(hash_cache, "baseline"), 100_000) == TASK_TOKENS
    assert longest_request(asked(hash_cache, "baseline"), 1024) == 1024
    alone = asked(hash_cache, "baseline", "evaluate.suite=perplexity")
    assert longest_request(alone, 100_000) == 513  # the window, and the token that ends it
