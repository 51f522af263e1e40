"""A recipe with a scheme for every unit: the given one with other `overrides` and `ignore`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quantize.quantization import Quantize
from quantize.recipe import Recipe
from quantize.schemes import GROUPED, SCHEMES
from quantize.search import Found
from quantize.sensitivity import BF16, Choice
from quantize.yaml_edit import REMOVED, KeyPath, changed

HEAD = "# Made by quantize search"
SCHEMA_COMMENT = "# yaml-language-server:"
NAME_LETTERS = 80


def mixed_recipe(
    text: str, file_name: str, recipe: Recipe, found: Found, moved: Mapping[KeyPath, Any]
) -> str:
    """The recipe `text` with the schemes that were `found`, its comments kept where possible.

    Its name, folder, repository and URL get the budget as a suffix: what the given recipe published
    is not overwritten. `moved` are further changes: ``--set``, and paths that start elsewhere now.
    """
    slug = found.budget.slug
    changes: dict[KeyPath, Any] = dict(moved)
    changes["name",] = f"{recipe.name[: NAME_LETTERS - len(slug) - 1]}-{slug}"
    changes |= quantize_changes(recipe.quantize, found)
    if recipe.publish.folder is not None:
        changes["publish", "folder"] = f"{recipe.publish.folder.rstrip('/')}-{slug}"
    if recipe.publish.hub is not None:
        changes["publish", "hub", "repo"] = f"{recipe.publish.hub.repo}-{slug}"
    if recipe.publish.url is not None:
        changes["publish", "url"] = f"{recipe.publish.url}-{slug}"
    return _headed(changed(text, changes), file_name, found)


def quantize_changes(quantize: Quantize, found: Found) -> dict[KeyPath, Any]:
    """What the block's keys become.

    The choice with the most parameters is the block's own where the method can produce it, so that
    overrides name the rest. What stays in BF16 is added to `ignore`.
    """
    modules: dict[Choice, list[str]] = defaultdict(list)
    for unit in found.among:
        modules[found.chosen.options[unit.name].choice] += unit.linears
    everything = {name for names in modules.values() for name in names}
    shares = found.chosen.shares
    possible = [choice for choice in shares if choice.scheme in SCHEMES[quantize.method]]
    own = Choice(quantize.effective_scheme, quantize.effective_group_size)
    changes: dict[KeyPath, Any] = {}
    if possible:
        own = max(possible, key=lambda choice: shares[choice])
        changes["quantize", "scheme"] = own.scheme
        size = own.group_size if own.scheme in GROUPED else None
        changes["quantize", "group_size"] = REMOVED if size is None else size
    left = patterns(modules[BF16], everything) if BF16 in shares else []
    changes["quantize", "ignore"] = [*quantize.ignore, *left]
    overrides = [
        _override(choice, patterns(modules[choice], everything))
        for choice in shares
        if choice not in (own, BF16)
    ]
    changes["quantize", "overrides"] = overrides or REMOVED
    return changes


def _override(choice: Choice, modules: list[str]) -> dict[str, Any]:
    size = {"group_size": choice.group_size} if choice.scheme in GROUPED else {}
    return {"modules": modules, "scheme": choice.scheme, **size}


def _headed(text: str, file_name: str, found: Found) -> str:
    """The text with how it was made as its first comment, below the editor's."""
    lines = text.split("\n")
    first = [lines.pop(0)] if lines[0].startswith(SCHEMA_COMMENT) else []
    if lines[0].startswith(HEAD):  # by an earlier search
        while lines[0].startswith("#"):
            del lines[0]
        if not lines[0]:
            del lines[0]
    chosen = found.chosen
    shares = ", ".join(f"{choice.label} {share:.1%}" for choice, share in chosen.shares.items())
    megabytes = f"{(chosen.bytes + found.rest_bytes) / 1e6:,.1f} MB"
    head = [
        f"{HEAD} --budget {found.budget.text}, from {file_name}:",
        f"# {chosen.bits:.3f} bits a parameter; with all other tensors {megabytes}.",
        f"# Relative squared output errors of {found.linears} linears: {chosen.error:.4g} in all.",
        f"# Parameters: {shares}.",
        "",
    ]
    return "\n".join([*first, *head, *lines])


# Patterns

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def patterns(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    r"""Names and `re:` patterns that match all of `chosen` and nothing else of `everything`.

    Modules that differ in their first number (the layer) or their last part alone share a pattern.
    Further numbers (experts) become `\d+` where all of a layer's are chosen.
    """
    members = _by_layer(chosen)
    universe = _by_layer(everything)
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)  # (prefix, suffix pattern) → layers
    for (prefix, shape, layer), suffixes in members.items():
        complete = suffixes == universe[prefix, shape, layer]
        for suffix in [shape] if complete else map(re.escape, suffixes):
            layers[prefix, suffix].add(layer)
    named: dict[tuple[str, str, frozenset[str]], set[str]] = defaultdict(set)
    for (prefix, suffix), own in layers.items():
        head, _, last = suffix.rpartition(r"\.")
        named[prefix, head, frozenset(own)].add(last)
    made = [
        _pattern(prefix, head, own, lasts, universe)
        for (prefix, head, own), lasts in sorted(named.items(), key=_position)
    ]
    return made + sorted(name for name in chosen if NUMBER.search(name) is None)


_Members = dict[tuple[str, str, str], set[str]]
"""(prefix, suffix pattern, layer) → the suffixes that are there."""


def _by_layer(names: Iterable[str]) -> _Members:
    r"""`model.layers.3.mlp.experts.7.w1` is (`model.layers.`, `mlp\.experts\.\d+\.w1`, `3`).

    Names without a number are left out.
    """
    found: _Members = defaultdict(set)
    for name in names:
        if number := NUMBER.search(name):
            suffix = name[number.end() + 1 :]
            parts = [r"\d+" if part.isdecimal() else re.escape(part) for part in suffix.split(".")]
            found[name[: number.start()], r"\.".join(parts), number[0]].add(suffix)
    return found


def _position(
    item: tuple[tuple[str, str, frozenset[str]], set[str]],
) -> tuple[str, str, list[int], list[str]]:
    (prefix, head, layers), lasts = item
    return prefix, head, sorted(map(int, layers)), sorted(lasts)


def _pattern(
    prefix: str, head: str, layers: frozenset[str], lasts: set[str], universe: _Members
) -> str:
    suffixes = [rf"{head}\.{last}" if head else last for last in lasts]
    # Suffixes without a shape of their own are single experts: their layers are written out.
    all_layers = {layer for p, shape, layer in universe if p == prefix and shape in suffixes}
    shapes = {shape for p, shape, _ in universe if p == prefix}
    numbers = sorted(layers, key=int)
    if all_layers == layers and shapes.issuperset(suffixes):
        layer = r"\d+"
    else:
        layer = _alternatives(numbers)
    dot = r"\." if head else ""
    return rf"re:{re.escape(prefix)}{layer}\.{head}{dot}{_alternatives(sorted(lasts))}$"


def _alternatives(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
