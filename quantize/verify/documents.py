"""The published documents against each other: statement, record, recipe and card.

Everything in them may come from a stranger: whatever it makes a function raise is a difference that
is reported, never a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from quantize import __version__
from quantize.errors import QuantizeError
from quantize.keys import difference
from quantize.model_files import is_weights
from quantize.provenance import (
    NO_SUBJECTS,
    PREDICATE_TYPE,
    RECIPE,
    RECORD,
    STATEMENT,
    STATEMENT_TYPE,
    statement,
)
from quantize.report.redact import base_name
from quantize.store import FileEntry
from quantize.verify.published import Published
from quantize.verify.verification import Check, Problem

CARD = "README.md"
RESULTS = ".eval_results/"
TEMPLATE = "quantize/card.md.j2"
"""A card's own template, where the recipe named one."""

SHOWN = 8
"""Values that differ which are named; the rest are counted."""


@dataclass(frozen=True)
class Document:
    """A parsed file, or why it could not be parsed."""

    name: str
    value: Any
    fault: str | None


def document(published: Published, name: str, parse: Callable[[str], Any]) -> Document:
    """A JSON or YAML mapping of what was published."""
    try:
        value = parse(published.text(name))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        return Document(name, None, f"{name} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(value, dict):
        return Document(name, None, f"{name} is not a mapping")
    return Document(name, value, None)


class _NoAliases(yaml.SafeLoader):
    """A few lines of aliases can stand for a million values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has aliases")
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """The value of a YAML document; a ValueError where it has aliases."""
    return yaml.load(text, Loader=_NoAliases)


def check_statement(published: Published, record: Document, recipe: Document) -> Check:
    """The statement against the listing, and against what it must say by the record."""
    made = document(published, STATEMENT, json.loads)
    if made.fault is not None:
        return Check.of("statement", "", [differs(STATEMENT, made.fault)])
    problems = _check_types(made.value) or _check_subjects(made.value, published.listing)
    if problems or record.fault is not None or recipe.fault is not None:
        return Check.of("statement", "its subjects are the listed files", problems)
    other = _made_by_another_version(record.value)
    if other is not None:
        return Check.of("statement", f"its subjects are the listed files; {other}", problems)
    try:
        entries = list(published.listing.values())
        expected = _by_name(statement(record.value, recipe.value, entries))
    except Exception as error:  # a stranger's record may be anything
        return Check.of("statement", "", [_incomplete(RECORD, error)])
    try:
        changes = difference(expected, _by_name(made.value))
    except Exception as error:
        return Check.of("statement", "", [_incomplete(STATEMENT, error)])
    problems = [
        differs(STATEMENT, f"{STATEMENT}: {change} (by the record → as it stands)")
        for change in _clipped(changes)
    ]
    return Check.of("statement", "in-toto, of these files, record and recipe", problems)


def check_record(published: Published, record: Document, recipe: Document) -> Check:
    """The record against the recipe beside it and the sizes of the weights."""
    for document in (record, recipe):
        if document.fault is not None:
            return Check.of("record", "", [differs(document.name, document.fault)])
    try:
        told = record.value["size"]["candidate_bytes"]
        recorded = _as_published(record.value["recipe"], recipe.value)
        changes = difference(recorded, recipe.value)
        weights = sum(
            entry.bytes
            for name, entry in published.listing.items()
            if is_weights(name) and "/" not in name
        )
    except Exception as error:
        return Check.of("record", "", [_incomplete(RECORD, error)])
    problems = [
        differs(RECIPE, f"{RECIPE}: {change} (in the record → in the recipe)")
        for change in _clipped(changes)
    ]
    if told != weights:
        text = f"{RECORD}: size.candidate_bytes is {told}, the weights have {weights} bytes"
        problems.append(differs(RECORD, text))
    return Check.of("record", "agrees with the recipe and the weights' size", problems)


def check_card(published: Published, record: Document) -> Check:
    """README.md and `.eval_results/` against what this program makes of the record."""
    if record.fault is not None:
        return Check("card", "skipped", "there is no record to compare it with")
    other = _made_by_another_version(record.value)
    if other is not None:
        return Check("card", "skipped", other)
    from quantize.report.card import differences, eval_results  # jinja2

    try:
        template = published.text(TEMPLATE) if "card_template" in record.value else None
        lines = differences(published.text(CARD), record.value, template)
        results = eval_results(record.value)
        problems = _check_results(published, results)
    except ValueError as error:
        return Check.of("card", "", [differs(CARD, str(error))])
    except QuantizeError as error:  # a template that cannot be rendered, or reaches out
        return Check.of("card", "", [differs(CARD, f"no card can be made: {error.message}")])
    except Exception as error:
        return Check.of("card", "", [_incomplete(RECORD, error)])
    problems = [differs(CARD, f"{CARD}: {line}") for line in lines] + problems
    return Check.of("card", "is what the record says, line by line", problems)


def _check_results(published: Published, results: Mapping[str, str]) -> list[Problem]:
    """The files that the Hub shows results from, against those of the record."""
    expected = {f"{RESULTS}{name}": text for name, text in results.items()}
    listed = {name for name in published.listing if name.startswith(RESULTS)}
    return [
        differs(name, f"{name} is not what the record says")
        for name in sorted(listed | expected.keys())
        if name not in expected or published.text(name) != expected[name]
    ]


def differs(file: str, text: str) -> Problem:
    """A problem of a document's contents."""
    return Problem("differs", file, text)


def _incomplete(file: str, error: Exception) -> Problem:
    said = " ".join(str(error).split())
    return differs(file, f"{file} is not complete: {type(error).__name__}: {said}")


def _check_types(made: Mapping[str, Any]) -> list[Problem]:
    return [
        differs(STATEMENT, f"{STATEMENT}: {key} is {made.get(key)!r}, not {value}")
        for key, value in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE))
        if made.get(key) != value
    ]


def _check_subjects(made: Mapping[str, Any], listing: Mapping[str, FileEntry]) -> list[Problem]:
    try:
        subjects = {item["name"]: item["digest"]["sha256"] for item in made["subject"]}
    except (KeyError, TypeError):
        return [differs(STATEMENT, f"{STATEMENT}: its subjects have no name and sha256")]
    listed = {name: e.sha256 for name, e in listing.items() if name not in NO_SUBJECTS}
    problems = []
    for name in sorted(subjects.keys() | listed.keys()):
        if name not in listed:
            problems.append(differs(STATEMENT, f"{STATEMENT}: {name} is not in the listing"))
        elif name not in subjects:
            problems.append(differs(STATEMENT, f"{STATEMENT}: {name} is not among its subjects"))
        elif subjects[name] != listed[name]:
            problems.append(differs(STATEMENT, f"{STATEMENT}: another sha256 for {name}"))
    return problems


def _made_by_another_version(record: Mapping[str, Any]) -> str | None:
    version = record.get("quantize")
    if version == __version__:
        return None
    return (
        f"made by quantize {str(version)[:40]}, this is {__version__}: what the record makes "
        "can be compared with that version alone"
    )


def _by_name(made: Mapping[str, Any]) -> dict[str, Any]:
    """A statement whose lists are mappings, so that a difference names its entry."""
    build = made["predicate"]["buildDefinition"]
    return {
        **made,
        "subject": {item["name"]: item["digest"] for item in made["subject"]},
        "predicate": {
            **made["predicate"],
            "buildDefinition": {
                **build,
                "resolvedDependencies": {
                    f"{item['annotations']['role']} {item['name']}": item
                    for item in build["resolvedDependencies"]
                },
            },
        },
    }


def _as_published(recorded: Any, published: Any) -> Any:
    """The record's recipe; a local input by its base name where the published one has that."""
    if isinstance(recorded, dict) and isinstance(published, dict):
        return {key: _as_published(item, published.get(key)) for key, item in recorded.items()}
    if isinstance(recorded, str) and base_name(recorded) == published:
        return published
    return recorded


def _clipped(changes: list[str]) -> list[str]:
    more = len(changes) - SHOWN
    return changes[:SHOWN] + ([f"and {more} more values"] if more > 0 else [])
