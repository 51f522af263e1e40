"""Strings from outside, made harmless for GitHub-flavoured Markdown and YAML.

Model names, licences, answers and reasons come from files that strangers wrote. In a template
every string must pass one of these filters: :func:`environment` refuses to print one that did not.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from quantize.report.templating import templates

_SPECIAL = re.compile(
    r"""[\\`*\[\]<>|~$&\#]
    | (?<![^\W_])_ | _(?![^\W_])  # underscores inside a word mean nothing
    | (?<=\w):(?=//)            # addresses would become links
    """,
    re.VERBOSE,
)
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Safe(str):
    """Markdown that went through a filter of this module."""

    __slots__ = ()


def one_line(value: object) -> str:
    """Control characters and line ends become spaces, direction overrides go, ends are cut."""
    kept = (
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c
        for c in str(value)
        if c not in _DIRECTIONS
    )
    return " ".join("".join(kept).split())


def text(value: object) -> Safe:
    """Running text or a table cell: one line, in which nothing has a meaning to Markdown."""
    return Safe(_SPECIAL.sub(lambda found: "\\" + found[0], one_line(value)))


def lines(value: object) -> Safe:
    """A table cell that keeps its line ends, as `<br>`."""
    return Safe("<br>".join(text(line) for line in str(value).strip().splitlines()))


def code(value: object) -> Safe:
    """A code span; its fence is longer than any run of backticks inside. Not for table cells."""
    content = one_line(value)
    if not content:
        return Safe("")
    fence = "`" * (_longest_run(content) + 1)
    space = " " if content[0] == "`" or content[-1] == "`" else ""
    return Safe(f"{fence}{space}{content}{space}{fence}")


def block(value: object, language: str = "") -> Safe:
    """A fenced code block; its fence is longer than any run of backticks inside."""
    content = "\n".join(_printable(line) for line in str(value).splitlines())
    fence = "`" * max(3, _longest_run(content) + 1)
    return Safe(f"{fence}{language}\n{content}\n{fence}")


def _printable(line: str) -> str:
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c
        for c in line.replace("\t", "    ")
        if c not in _DIRECTIONS
    )


def _longest_run(content: str) -> int:
    return max((len(run) for run in re.findall(r"`+", content)), default=0)


def count(value: int) -> Safe:
    """1,234"""
    return Safe(f"{value:,}")


def clip(value: object, length: int) -> str:
    """The first `length` characters, with an ellipsis where there were more."""
    content = str(value)
    return content if len(content) <= length else content[: length - 1] + "…"


def clip_start(value: object, length: int) -> str:
    """The last `length` characters, with an ellipsis where there were more."""
    content = str(value)
    return content if len(content) <= length else "…" + content[1 - length :]


class _Dumper(yaml.SafeDumper):
    """Strings with line ends on one line, quoted: no reader may take a line of them for the end."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out each time."""
        return True


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if "\n" in value or "\r" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)


def front_matter(values: Mapping[str, Any]) -> Safe:
    """The YAML block at the top of a card."""
    dumped = yaml.dump(
        dict(values),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=float("inf"),
    )
    return Safe(f"---\n{dumped}---")


def _checked(value: Any) -> Any:
    if isinstance(value, (Safe, int, jinja2.Undefined)):
        return value
    raise TypeError(f"the template prints {value!r} without a filter of quantize.report.markdown")


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this package; printing a string that passed no filter is a TypeError."""
    found = templates(autoescape=False, finalize=_checked, keep_trailing_newline=True)
    found.filters |= {
        "text": text,
        "lines": lines,
        "plain": Safe,
        "count": count,
        "code": code,
        "block": block,
        "clip": clip,
        "clip_start": clip_start,
        "front_matter": front_matter,
    }
    return found
