"""Whether a published checkpoint is still what was published: `quantize verify`.

Each check looks at one thing, and says everything that it finds:

- `files`: every file has the size and sha256 of the listing; none is missing, none was added
- `statement`: its subjects are the listed files, and what it says of their making is what the
  record and the recipe say
- `record`: it is complete, and agrees with the recipe and with the files' sizes
- `card`: README.md is what this program makes of the record, line by line
- `tensors`: each safetensors file's header accounts for every byte
- `signature`: it is the given key's or identity's, and of exactly these files

A changed figure on the card shows in `files`; where listing and statement were made to fit, in
`card`; where record and card were both made to fit, in `signature` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantize import __version__
from quantize.errors import SourceError
from quantize.keys import difference
from quantize.listing import LISTING, SIGNATURE
from quantize.progress import Progress
from quantize.provenance import (
    NO_SUBJECTS,
    PREDICATE_TYPE,
    RECIPE,
    RECORD,
    STATEMENT,
    STATEMENT_TYPE,
    statement,
)
from quantize.published import Published, is_ours, read_published
from quantize.report.redact import base_name
from quantize.store import FileEntry
from quantize.tensors import read_header
from quantize.verification import Check, Problem, Trust, Verification

CARD = "README.md"
TEMPLATE = "quantize/card.md.j2"
"""A card's own template, where the recipe named one."""

LARGE_BYTES = 1 << 30
"""From here on reading takes long enough to tell of it."""

SHOWN = 8
"""Values that differ which are named; the rest are counted."""


def verify_place(
    place: str, revision: str | None, trust: Trust, *, full: bool, progress: Progress
) -> Verification:
    """Read a folder or a repository and verify it; raises what :func:`read_published` raises."""

    def on_progress(done: int, total: int) -> None:
        if total >= LARGE_BYTES:
            progress.step("reading", round(done / 1e9, 2), round(total / 1e9, 2), "GB")

    with read_published(place, revision, full=full, on_progress=on_progress) as published:
        return verify(published, trust)


def verify(published: Published, trust: Trust) -> Verification:
    """Make every check that can be made of what was read."""
    record = _document(published, RECORD, json.loads)
    recipe = _document(published, RECIPE, yaml.safe_load)
    checks = (
        check_files(published),
        check_statement(published, record, recipe),
        check_record(published, record, recipe),
        check_card(published, record),
        check_tensors(published),
        check_signature(published, trust),
    )
    return Verification(published.place, published.commit, checks)


def check_files(published: Published) -> Check:
    """Listing against what is there."""
    problems = [
        Problem("link", name, f"{name} is a link, which is not followed")
        for name in published.links
        if is_ours(name)
    ]
    for name, entry in sorted(published.listing.items()):
        found = published.found.get(name)
        if found is None:
            if name not in published.links:
                problems.append(Problem("missing", name, f"{name} is missing"))
        elif found.bytes != entry.bytes:
            text = f"{name} was changed: {found.bytes:,} bytes, not {entry.bytes:,}"
            problems.append(Problem("changed", name, text))
        elif found.sha256 != entry.sha256:
            problems.append(Problem("changed", name, f"{name} was changed: another sha256"))
    for name in sorted(published.found.keys() - published.listing.keys() - {LISTING}):
        if is_ours(name):
            problems.append(Problem("added", name, f"{name} was added: it is not in the listing"))
    total = sum(entry.bytes for entry in published.listing.values())
    count = len(published.listing)
    return _check("files", f"{count} files, {total:,} bytes, as listed", problems)


def check_statement(published: Published, record: _Document, recipe: _Document) -> Check:
    """The statement against the listing, and against what it must say by the record."""
    made = _document(published, STATEMENT, json.loads)
    if made.fault is not None:
        return _check("statement", "", [_differs(STATEMENT, made.fault)])
    problems = _check_types(made.value) or _check_subjects(made.value, published.listing)
    if problems or record.fault is not None or recipe.fault is not None:
        return _check("statement", "its subjects are the listed files", problems)
    other = _made_by_another_version(record.value)
    if other is not None:
        return _check("statement", f"its subjects are the listed files; {other}", problems)
    try:
        entries = list(published.listing.values())
        expected = _by_name(statement(record.value, recipe.value, entries))
    except Exception as error:  # a stranger's record may be anything
        return _check("statement", "", [_incomplete(RECORD, error)])
    try:
        changes = difference(expected, _by_name(made.value))
    except Exception as error:
        return _check("statement", "", [_incomplete(STATEMENT, error)])
    problems = [
        _differs(STATEMENT, f"{STATEMENT}: {change} (by the record → as it stands)")
        for change in _clipped(changes)
    ]
    return _check("statement", "in-toto, of these files, record and recipe", problems)


def check_record(published: Published, record: _Document, recipe: _Document) -> Check:
    """The record against the recipe beside it and the sizes of the weights."""
    for document in (record, recipe):
        if document.fault is not None:
            return _check("record", "", [_differs(document.name, document.fault)])
    try:
        told = record.value["size"]["candidate_bytes"]
        recorded = _as_published(record.value["recipe"], recipe.value)
        changes = difference(recorded, recipe.value)
        weights = sum(
            entry.bytes
            for name, entry in published.listing.items()
            if name.endswith(".safetensors") and "/" not in name
        )
    except Exception as error:
        return _check("record", "", [_incomplete(RECORD, error)])
    problems = [
        _differs(RECIPE, f"{RECIPE}: {change} (in the record → in the recipe)")
        for change in _clipped(changes)
    ]
    if told != weights:
        text = f"{RECORD}: size.candidate_bytes is {told}, the weights have {weights} bytes"
        problems.append(_differs(RECORD, text))
    return _check("record", "agrees with the recipe and the weights' size", problems)


def check_card(published: Published, record: _Document) -> Check:
    """README.md against what this program makes of the record."""
    if record.fault is not None:
        return Check("card", "skipped", "there is no record to compare it with")
    other = _made_by_another_version(record.value)
    if other is not None:
        return Check("card", "skipped", other)
    from quantize.report.card import differences  # jinja2

    try:
        template = published.text(TEMPLATE) if TEMPLATE in published.listing else None
        lines = differences(published.text(CARD), record.value, template)
    except ValueError as error:
        return _check("card", "", [_differs(CARD, str(error))])
    except Exception as error:
        return _check("card", "", [_incomplete(RECORD, error)])
    problems = [_differs(CARD, f"{CARD} {line}") for line in lines]
    return _check("card", "is what the record says, line by line", problems)


def check_tensors(published: Published) -> Check:
    """Headers of the safetensors files that are here."""
    names = sorted(name for name in published.listing if name.endswith(".safetensors"))
    here = [name for name in names if name in published.readable]
    if not here and names:
        return Check("tensors", "skipped", "compared by the Hub's sha256; --full downloads them")
    problems, count = [], 0
    for name in here:
        try:
            count += len(read_header(published.folder / name))
        except SourceError as error:
            problems.append(_differs(name, error.message))
    return _check("tensors", f"headers account for every byte ({count:,} tensors)", problems)


def check_signature(published: Published, trust: Trust) -> Check:
    """The signature against the files' sha256, by the key or the identity that is trusted."""
    if SIGNATURE not in published.readable:
        if not trust.named:
            return Check("signature", "skipped", "not signed")
        text = f"not signed: there is no {SIGNATURE}"
        return _check("signature", "", [Problem("missing", SIGNATURE, text)])
    if not trust.named:
        whom = "--key, or --identity and --issuer, say by whom it must be"
        return Check("signature", "skipped", f"signed, not verified: {whom}")
    from quantize.signing import library

    tool, path = library(), published.folder / SIGNATURE
    digests = {
        name: entry.sha256
        for name, entry in published.found.items()
        if name in published.listing and name != SIGNATURE
    }
    if trust.key is not None:
        faults = tool.problems_with_key(path, _public_key(trust.key), "model", digests)
        who = f"by the key {trust.key.name}"
    else:
        faults = tool.problems_with_identity(path, trust.identity, trust.issuer, "model", digests)
        who = f"by {trust.identity}"
    problems = [_differs(SIGNATURE, f"{SIGNATURE}: {fault}") for fault in faults]
    return _check("signature", f"signed {who}", problems)


@dataclass(frozen=True)
class _Document:
    """A parsed file, or why it could not be parsed."""

    name: str
    value: Any
    fault: str | None


def _document(published: Published, name: str, parse: Callable[[str], Any]) -> _Document:
    try:
        value = parse(published.text(name))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        return _Document(name, None, f"{name} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(value, dict):
        return _Document(name, None, f"{name} is not a mapping")
    return _Document(name, value, None)


def _check(name: str, passed: str, problems: list[Problem]) -> Check:
    if problems:
        return Check(name, "failed", "", tuple(problems))
    return Check(name, "passed", passed)


def _differs(file: str, text: str) -> Problem:
    return Problem("differs", file, text)


def _incomplete(file: str, error: Exception) -> Problem:
    said = " ".join(str(error).split())
    return _differs(file, f"{file} is not complete: {type(error).__name__}: {said}")


def _check_types(made: Mapping[str, Any]) -> list[Problem]:
    return [
        _differs(STATEMENT, f"{STATEMENT}: {key} is {made.get(key)!r}, not {value}")
        for key, value in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE))
        if made.get(key) != value
    ]


def _check_subjects(made: Mapping[str, Any], listing: Mapping[str, FileEntry]) -> list[Problem]:
    try:
        subjects = {item["name"]: item["digest"]["sha256"] for item in made["subject"]}
    except (KeyError, TypeError):
        return [_differs(STATEMENT, f"{STATEMENT}: its subjects have no name and sha256")]
    listed = {name: e.sha256 for name, e in listing.items() if name not in NO_SUBJECTS}
    problems = []
    for name in sorted(subjects.keys() | listed.keys()):
        if name not in listed:
            problems.append(_differs(STATEMENT, f"{STATEMENT}: {name} is not in the listing"))
        elif name not in subjects:
            problems.append(_differs(STATEMENT, f"{STATEMENT}: {name} is not among its subjects"))
        elif subjects[name] != listed[name]:
            problems.append(_differs(STATEMENT, f"{STATEMENT}: another sha256 for {name}"))
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


def _public_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"cannot read the key {path}: {error.strerror or error}", "correct --key"
        ) from error
