"""Whether a JSON value has the shape of a record type: what is missing or of another kind.

Records are read from files that may be of another version or edited by hand; a report of them names
the place instead of failing in the middle of a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NotRequired, get_args, get_origin, get_type_hints, is_typeddict


def problems(value: object, kind: Any, where: str) -> Iterator[str]:
    """A sentence for each place where `value` is not a `kind`.

    `kind` is a TypedDict, a list or dict of one, a Literal, or a plain type. Keys that the type
    does not have are left alone: a later version may have added them.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        yield from _typed_dict(value, kind, where)
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where} is {_name(value)}, not a list"
            return
        for index, item in enumerate(value):
            yield from problems(item, inner[0], f"{where}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where} is {_name(value)}, not an object"
            return
        for key, item in value.items():
            yield from problems(item, inner[1], f"{where}.{key}")
    elif origin is Literal:
        if value not in inner:
            yield f"{where} is {value!r}, not one of {', '.join(map(repr, inner))}"
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{where} is {_name(value)}, not a number"
        elif not math.isfinite(value):
            yield f"{where} is {value}, not a finite number"
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{where} is {_name(value)}, not {kind.__name__}"


def _typed_dict(value: object, kind: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is {_name(value)}, not an object"
        return
    # Not `__required_keys__`: it misreads annotations that are strings on Python 3.11.
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        if name in value:
            yield from problems(
                value[name], get_args(hint)[0] if optional else hint, f"{where}.{name}"
            )
        elif not optional:
            yield f"{where}.{name} is missing"


def _name(value: object) -> str:
    return "null" if value is None else type(value).__name__
