"""A YAML file → a frozen :class:`Recipe`, :class:`Suite` or :class:`Prompts`, or all its mistakes.

The file is read by :mod:`quantize.yaml_values`, the values are checked by pydantic, and every
problem is put into plain words with its line and the nearest known name. ``--set key=value``
changes values after the file is read and before they are checked.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quantize.errors import Problem, RecipeError
from quantize.recipe import Recipe
from quantize.suite import Prompts, Suite
from quantize.yaml_values import (
    MOST_PROBLEMS,
    Document,
    Path_,
    dotted,
    parse,
    read_document,
    shorten,
)

T = TypeVar("T", bound=BaseModel)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are ``key.path=value`` with the value in YAML.

    Raises RecipeError with every mistake of the file and the overrides, UsageError if the file
    cannot be read.
    """
    return _load(Path(path), Recipe, overrides)


def load_suite(path: str | os.PathLike[str]) -> Suite:
    """Read a suite file; errors as for :func:`load_recipe`."""
    return _load(Path(path), Suite, ())


def load_prompts(path: str | os.PathLike[str]) -> Prompts:
    """Read a file of smoke prompts; errors as for :func:`load_recipe`."""
    return _load(Path(path), Prompts, ())


def _load(path: Path, kind: type[T], overrides: Sequence[str]) -> T:
    document = read_document(path)
    readable = isinstance(document.value, dict)
    if not readable and not document.problems:
        document.refuse(1, (), f"expected keys and values, got {_describe(document.value)}")
    for override in overrides:
        _override(document, override)
    if readable:
        try:
            result = kind.model_validate(document.value)
            if not document.problems:
                return result
        except ValidationError as error:
            details = error.errors(include_url=False)
            document.problems += _problems(kind, document, details)
    raise RecipeError(os.fspath(path), document.problems)


# --set


def _override(document: Document, override: str) -> None:
    """Put one ``key.path=value`` into the document; its line is 0, the command line."""
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    option = f"--set {shorten(override)}"
    if not equals or not all(parts):
        message = "expected key=value, e.g. --set quantize.group_size=64"
        document.problems.append(Problem(0, option, message))
        return
    given = parse(text)
    if given.problems:
        document.problems += [Problem(0, f"--set {key}", p.message) for p in given.problems]
        return
    if not isinstance(document.value, dict):
        return
    block = document.value
    for depth, part in enumerate(parts[:-1], 1):
        if block.get(part) is None:
            block[part] = {}
            document.lines[parts[:depth]] = 0
        block = block[part]
        if not isinstance(block, dict):
            message = f"{'.'.join(parts[:depth])} holds no keys"
            document.problems.append(Problem(0, f"--set {key}", message))
            return
    block[parts[-1]] = given.value
    for where in [path for path in document.lines if path[: len(parts)] == parts]:
        del document.lines[where]
        document.refused.discard(where)
    document.lines[parts] = 0


# pydantic's errors in plain words


def _problems(
    kind: type[BaseModel], document: Document, details: Sequence[ErrorDetails]
) -> Iterator[Problem]:
    """One Problem per mistake.

    Values that were refused before are left out, and where a required key is misspelt, its absence.
    """
    details = details[: 2 * MOST_PROBLEMS]  # each unknown key is compared with all known ones
    meant = {_meant(kind, _key_path(detail)) for detail in details if _is_unknown(detail)}
    for detail in details[:MOST_PROBLEMS]:
        path = _key_path(detail)
        if any(path[: len(refused)] == refused for refused in document.refused):
            continue
        if detail["type"] == "missing" and path in meant:
            continue
        line, where = _place(document, path)
        message = _unknown(kind, path) if _is_unknown(detail) else _words(kind, path, detail)
        yield Problem(line, where, message)


def _key_path(detail: ErrorDetails) -> Path_:
    """Where it is; pydantic marks a bad key of a mapping with a last part `[key]`."""
    path = tuple(detail["loc"])
    marked = path[-1:] == ("[key]",) and detail["type"] != "extra_forbidden"
    return path[:-1] if marked else path


def _is_unknown(detail: ErrorDetails) -> bool:
    return detail["type"] == "extra_forbidden" or detail["loc"][-1:] == ("[key]",)


def _meant(kind: type[BaseModel], path: Path_) -> Path_ | None:
    """The key beside an unknown one that it is most like, if any."""
    near = difflib.get_close_matches(str(path[-1]), list(_keys_at(kind, path[:-1])), 1)
    return (*path[:-1], near[0]) if near else None


def _place(document: Document, path: Path_) -> tuple[int, str]:
    """Line and name of a key; of the block it belongs to when it is missing itself."""
    known = path
    while known and known not in document.lines:
        known = known[:-1]
    line = document.lines.get(known, 1)
    where = dotted(path)
    return (0, f"--set {where}") if line == 0 else (line, where)


def _words(kind: type[BaseModel], path: Path_, detail: ErrorDetails) -> str:
    """What is wrong with the value, in words that name no Python type."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    got = _describe(detail["input"])
    match detail["type"]:
        case "missing":
            return f"this key is required{_purpose(kind, path)}"
        case "literal_error":
            return _choice(kind, path, detail["input"])
        case "value_error":
            return str(context["error"])
        case "string_pattern_mismatch" | "string_too_short" | "string_too_long":
            return f"{got} does not fit{_purpose(kind, path)}"
        case "greater_than":
            return f"{got} is too small: must be above {context['gt']:g}"
        case "greater_than_equal":
            return f"{got} is too small: must be at least {context['ge']:g}"
        case "less_than":
            return f"{got} is too large: must be below {context['lt']:g}"
        case "less_than_equal":
            return f"{got} is too large: must be at most {context['le']:g}"
        case error_type:
            expected = _EXPECTED.get(error_type)
            if expected is None:
                return f"{detail['msg']} (got {got})"
            quote = error_type == "string_type" and isinstance(detail["input"], int | float)
            return f"expected {expected}, got {got}" + (": put it in quotes" if quote else "")


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}


def _describe(value: Any) -> str:
    """A value as a person would call it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {shorten(str(value))}"
    if isinstance(value, str):
        return f"the text '{shorten(value)}'"
    return "a list" if isinstance(value, tuple) else "keys and values"


def _purpose(kind: type[BaseModel], path: Path_) -> str:
    """The field's description, where there is one, to close a sentence with."""
    model = _model_at(kind, path[:-1])
    field = model.model_fields.get(str(path[-1])) if model is not None else None
    return f": {field.description.rstrip('.')}" if field and field.description else ""


def _choice(kind: type[BaseModel], path: Path_, value: Any) -> str:
    """A value that is none of the allowed ones, with the nearest of them."""
    model = _model_at(kind, path[: _last_key(path)])
    name = str(path[_last_key(path)])
    annotation = model.model_fields[name].annotation if model is not None else None
    allowed = list(_literals(annotation))
    names = [name for name in allowed if isinstance(name, str)]
    near = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
    hint = f", did you mean {near[0]}" if near else ""
    if len(allowed) == 1:
        return f"{_describe(value)} is not known here: write {allowed[0]}"
    return f"{_describe(value)} is not one of {', '.join(str(a) for a in allowed)}{hint}"


def _last_key(path: Path_) -> int:
    """Index of the last part of `path` that is a key and not a list index."""
    return max(index for index, part in enumerate(path) if isinstance(part, str))


def _unknown(kind: type[BaseModel], path: Path_) -> str:
    """An unknown key: the nearest name beside it, or the block that it belongs to."""
    key = str(path[-1])
    here = list(_keys_at(kind, path[:-1]))
    elsewhere: dict[str, str] = {}
    for block, name in _all_keys(kind, ()):
        if block != path[:-1]:
            elsewhere.setdefault(name, dotted(block) or "the top level")
    if key in elsewhere:
        return f"unknown key here: it belongs under {elsewhere[key]}"
    if meant := _meant(kind, path):
        return f"unknown key, did you mean {meant[-1]}"
    near = difflib.get_close_matches(key, elsewhere, 1, 0.75)
    if near:
        return f"unknown key, did you mean {near[0]} under {elsewhere[near[0]]}"
    return f"unknown key, known here: {', '.join(here)}"


# What the types say


def _model_at(kind: type[BaseModel], path: Path_) -> type[BaseModel] | None:
    """The block type at a key path, or None where there is no block of fixed keys."""
    annotation: Any = kind
    for part in path:
        model = _model(annotation)
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
        elif model is None:
            annotation = _item(annotation)
        else:
            return None
    return _model(annotation)


def _keys_at(kind: type[BaseModel], path: Path_) -> Iterator[str]:
    """Names that may stand at a key path: a block's fields, or a mapping's literal keys."""
    model = _model_at(kind, path)
    if model is not None:
        yield from model.model_fields
        return
    parent = _model_at(kind, path[:-1])
    if parent is not None:
        annotation = parent.model_fields[str(path[-1])].annotation
        yield from (str(name) for name in _literals(typing.get_args(annotation)[0]))


def _all_keys(kind: type[BaseModel], path: Path_) -> Iterator[tuple[Path_, str]]:
    """Every (block, key) of a file's type, outer blocks first; blocks inside lists are left out."""
    for name in kind.model_fields:
        yield path, name
    for name, field in kind.model_fields.items():
        model = _model(field.annotation)
        if model is not None:
            yield from _all_keys(model, (*path, name))


def _model(annotation: Any) -> type[BaseModel] | None:
    """The block type of an annotation: X, or X | None."""
    for candidate in _alternatives(annotation):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _item(annotation: Any) -> Any:
    """The element type of tuple[X, ...], the value type of dict[K, X]."""
    for candidate in _alternatives(annotation):
        arguments = typing.get_args(candidate)
        if typing.get_origin(candidate) is tuple:
            return arguments[0]
        if typing.get_origin(candidate) is dict:
            return arguments[1]
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _literals(annotation: Any) -> Iterator[Any]:
    """Every value of the Literal types inside an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for argument in typing.get_args(annotation):
        yield from _literals(argument)
