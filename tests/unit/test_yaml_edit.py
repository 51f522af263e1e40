"""Editing YAML text: the values are the wanted ones, the rest of the text stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.yaml_edit import REMOVED, KeyPath, changed, write_yaml
from quantize.yaml_values import parse

RECIPE = """\
# a recipe
version: 1 # of the format

model: # which
  source: here # a folder
  # base: unknown

quantize:
  method: awq
  # what stays
  ignore: # the head
    - lm_head
    # and the routers
    - 're:.*gate$'
  group_size: 128 # divides

# at the end
publish: {folder: out/x, hub: {repo: a/b}}
"""

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
    | st.sampled_from(["no", "1e-3", "010", "1:30", "2026-11-20", "re:a\\.(0|1)$", "ä#b: c", "="])
)
keys = st.sampled_from(["a", "b", "c", "long_key"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(keys, values, min_size=1, max_size=4)
paths = st.lists(keys, min_size=1, max_size=3).map(tuple)


def assigned(value: Any, path: KeyPath, new: Any) -> Any:
    """What a document holds after one change, said once more."""
    value = dict(value) if isinstance(value, dict) else {}
    if len(path) > 1:
        value[path[0]] = assigned(value.get(path[0]), path[1:], new)
    elif new is REMOVED:
        value.pop(path[0], None)
    else:
        value[path[0]] = new
    return value


def read(text: str) -> Any:
    document = parse(text)
    assert not document.problems, (text, document.problems)
    return document.value


@given(documents, st.sampled_from([None, True, False]))
def test_what_is_written_is_read(value: dict[str, Any], flow: bool | None) -> None:
    assert read(write_yaml(value, flow=flow)) == read(write_yaml(copy.deepcopy(value), flow=False))


@given(documents, st.sampled_from([None, True, False]), st.dictionaries(paths, values, max_size=3))
def test_any_change_to_any_form(
    value: dict[str, Any], flow: bool | None, changes: dict[KeyPath, Any]
) -> None:
    wanted: Any = value
    for path, new in changes.items():
        wanted = assigned(wanted, path, new)
    edited = changed(write_yaml(value, flow=flow), changes)
    assert read(edited) == read(write_yaml(wanted))


@given(st.sampled_from([("model", "source"), ("quantize", "group_size"), ("version",)]), scalars)
def test_a_scalar_changes_alone(path: KeyPath, new: Any) -> None:
    edited = changed(RECIPE, {path: new})
    assert read(edited) == assigned_tuples(path, new)
    before, after = RECIPE.splitlines(), edited.splitlines()
    different = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(different) <= 1
    for old, line in different:
        assert line.startswith(old.partition(":")[0])
        assert line.endswith(old.partition("#")[2])


def assigned_tuples(path: KeyPath, new: Any) -> Any:
    return assigned(read(RECIPE), path, new)


@pytest.mark.parametrize(
    ("changes", "there", "gone"),
    [
        ({("quantize", "ignore"): ["lm_head"]}, "  ignore: [lm_head] # the head\n", "routers"),
        ({("quantize", "ignore"): REMOVED}, "  # what stays\n  group_size", "lm_head"),
        ({("quantize", "group_size"): REMOVED}, "\n# at the end\n", "128"),
        (
            {("quantize", "overrides"): [{"modules": ["re:a$"], "scheme": "W8A16"}]},
            "  group_size: 128 # divides\n  overrides:\n    - modules:\n        - 're:a$'\n"
            "      scheme: W8A16\n\n# at the end\n",
            "\t",
        ),
        ({("model", "adapter"): "x"}, "  source: here # a folder\n  adapter: x\n", "\t"),
        ({("serve", "kv_cache_gib"): 4}, "}}\nserve: {kv_cache_gib: 4}\n", "\t"),
    ],
)
def test_forms(changes: dict[KeyPath, Any], there: str, gone: str) -> None:
    edited = changed(RECIPE, changes)
    assert there in edited
    assert gone not in edited
    assert "# a recipe\n" in edited
    assert "publish: {folder: out/x, hub: {repo: a/b}}\n" in edited


def test_a_list_of_blocks_is_replaced_by_another() -> None:
    first = changed(RECIPE, {("quantize", "overrides"): [{"modules": ["a"], "scheme": "W8A16"}]})
    second = changed(first, {("quantize", "overrides"): [{"modules": ["b"], "scheme": "FP8"}]})
    assert second == first.replace("[a]", "[b]").replace("W8A16", "FP8")


def test_a_long_list_stands_in_lines_and_keeps_the_comment() -> None:
    patterns = [rf"re:model\.layers\.{i}\.self_attn\.o_proj$" for i in range(4)]
    text = "quantize:\n  ignore: [lm_head] # the head\n  method: awq\n"
    edited = changed(text, {("quantize", "ignore"): ["lm_head", *patterns]})
    assert max(map(len, edited.splitlines())) <= 100
    assert "  ] # the head\n" in edited


def test_an_inner_block_in_one_line_is_written_anew_without_comments() -> None:
    edited = changed(RECIPE, {("publish", "hub", "repo"): "a/b-5bits"})
    assert read(edited)["publish"] == {"folder": "out/x", "hub": {"repo": "a/b-5bits"}}
