"""Content addresses: equal values have equal keys, and what differs can be said."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.hash_cache import HashCache
from quantize.keys import canonical, difference, digest, file_sha256, tree_sha256

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(-1e6, 1e6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
inputs = st.dictionaries(st.sampled_from("abc"), values)


def test_canonical_text() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'
    assert canonical((1, 2)) == canonical([1, 2])
    assert digest({}) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": float("-inf")}])
def test_no_key_of_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest(value)


@given(inputs)
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@given(inputs, inputs)
def test_a_difference_is_found_exactly_when_the_digests_differ(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert bool(difference(old, new)) == (digest(old) != digest(new))
    assert difference(old, old) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            {"with": {"scheme": "W4A16"}},
            {"with": {"scheme": "FP8"}},
            'with.scheme: "W4A16" → "FP8"',
        ),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": [2]}}, "a.c: absent → [2]"),
        ({"a": 1}, {}, "a: 1 → absent"),
        ({"a": None}, {}, "a: null → absent"),
        ({"a": None}, {"a": 0}, "a: null → 0"),
        ({"a": True}, {"a": 1}, "a: true → 1"),
        ({"a": {"b": 1}}, {"a": 2}, 'a: {"b":1} → 2'),
        ({"k": "a" * 64}, {"k": "b" * 64}, "k: aaaaaaaaaaaa → bbbbbbbbbbbb"),
        ({"k": ["x" * 60]}, {"k": []}, 'k: ["' + "x" * 43 + "... → []"),
        ({"k": ("a",)}, {"k": ["a"]}, None),
    ],
)
def test_a_difference_says_what(
    old: dict[str, Any], new: dict[str, Any], expected: str | None
) -> None:
    assert difference(old, new) == ([] if expected is None else [expected])


def test_differences_come_in_order() -> None:
    assert difference({"b": 1, "a": 1}, {"c": 1}) == [
        "a: 1 → absent", "b: 1 → absent", "c: absent → 1"
    ]  # fmt: skip


def test_files_and_trees(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert file_sha256(tmp_path / "a") == known
    tree = tree_sha256(tmp_path, ["a", "b/c"])
    assert tree == tree_sha256(tmp_path, ["b/c", "a"])
    assert tree != tree_sha256(tmp_path, ["a"])
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    assert tree != tree_sha256(tmp_path, ["a", "b/d"])
    (tmp_path / "b" / "d").rename(tmp_path / "b" / "c")
    assert tree == tree_sha256(tmp_path, ["a", "b/c"])
    (tmp_path / "b" / "c").write_bytes(b"x")
    assert tree != tree_sha256(tmp_path, ["a", "b/c"])


def test_a_tree_has_the_same_digest_with_the_cache(tmp_path: Path) -> None:
    """Whichever files it knows already, and whichever of several is hashed first."""
    names = [f"{number}.safetensors" for number in range(8)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes((8 - number) << 16))
    cache = HashCache(tmp_path / "cache.json", settle_seconds=-1)
    assert cache.tree(tmp_path, names[2:6:2]) == tree_sha256(tmp_path, names[2:6:2])
    assert cache.tree(tmp_path, names) == tree_sha256(tmp_path, names)
    assert cache.tree(tmp_path, names[::-1]) == tree_sha256(tmp_path, names)
