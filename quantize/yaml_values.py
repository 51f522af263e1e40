"""YAML text → plain values with a line for every key, refusing what YAML versions disagree about.

PyYAML reads YAML 1.1, editors and most other tools YAML 1.2. Where the two differ (``no``,
``1e-3``, ``010``, ``1:30``, dates) a file would silently mean two things, so such a scalar is a
mistake that says what to write instead. All else is read by YAML 1.2's core schema (10.3.2).
Aliases, tags and merge keys are refused: a recipe needs none, and aliases can grow without bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import Problem, SourceError, UsageError
from quantize.untrusted import open_regular

Path_ = tuple[str | int, ...]
"""Where a value stands: keys, and indices of list items (from 0)."""

MAX_BYTES = 256 << 10
"""Forty times the longest file that ships; PyYAML reads 100 kB a second."""

MAX_DEPTH = 32

LONGEST_PLAIN = 1000
"""Characters of an unquoted scalar. Of a longer one the patterns below would take minutes."""

MOST_PROBLEMS = 50
"""Mistakes that are described; a file of another kind has one on every line."""


class Unusable:
    """Stands where a value was refused: fails every type, so that nothing is built on it."""


@dataclass
class Document:
    """What a file holds: mappings as dict, sequences as tuple, scalars."""

    value: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    refused: set[Path_] = field(default_factory=set)  # already reported; say no more about them
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, line: int, path: Path_, message: str) -> Unusable:
        """Report a value and put a placeholder where it would stand."""
        self.problems.append(Problem(line, dotted(path), message))
        self.refused.add(path)
        return Unusable()


def dotted(path: Path_) -> str:
    """``evaluate.tasks[0].name``; a key with unprintable characters is escaped."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if part.isprintable() else repr(part)[1:-1])
    return text


def read_document(path: Path) -> Document:
    """Read a file; an unreadable one is a UsageError, everything in it is a Problem."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except SourceError as error:
        raise UsageError(error.message, error.hint) from error
    if len(data) > MAX_BYTES:
        return _failed(1, f"larger than {MAX_BYTES >> 10} KiB: this is no recipe or suite file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return _failed(line, f"not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8")
    document = parse(text)
    if document.value is None and not document.problems:
        return _failed(1, "the file is empty")
    return document


def parse(text: str) -> Document:
    """Values of YAML text; a syntax error is the only problem that hides later ones."""
    document = Document()
    try:
        loader = _Composer(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, int) else ord(error.character)
        return _failed(line, f"character U+{character:04X} may not stand in YAML")
    except yaml.MarkedYAMLError as error:
        return _failed(*_syntax(error))
    except RecursionError:
        return _failed(1, f"nested more than {MAX_DEPTH} levels deep")
    except (ValueError, OverflowError, AssertionError, IndexError) as error:
        # PyYAML lets Python's own errors through for some malformed escapes and directives.
        return _failed(1, f"not valid YAML: {error}")
    if node is not None:
        _Reader(document).read_root(node)
    return document


def _failed(line: int, message: str) -> Document:
    document = Document(value=Unusable())
    document.refuse(line, (), message)
    return document


class _Composer(yaml.SafeLoader):
    """Composes nodes; marks aliases, anchors and explicit tags instead of obeying them."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            start: Any = event.start_mark
            return _marked(yaml.ScalarNode("", "", start), "alias")
        mark = ""
        if getattr(event, "anchor", None) is not None:
            mark, event.anchor = "anchor", None
        if getattr(event, "tag", None) is not None:
            mark, event.tag = f"tag {event.tag}", None
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return _marked(node, mark) if mark and node is not None else node


def _marked(node: yaml.Node, mark: str) -> yaml.Node:
    node.refused_mark = mark  # type: ignore[attr-defined]
    return node


def _syntax(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    """Line and words for a syntax error."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    problem = error.problem or "not valid YAML"
    if "'\\t'" in problem:
        return line, "a tab: YAML is indented with spaces only"
    if "expected a single document" in (error.context or ""):
        return line, "a second document starts here (---): one file holds one"
    if "mapping values are not allowed" in problem:
        return line, "a colon where none can stand: check the indentation, or quote the value"
    if "could not find expected ':'" in problem:
        return line, "a key without a colon and a value"
    if "cannot start any token" in problem:
        return line, f"{problem}: quote the value"
    context = f" ({error.context})" if error.context else ""
    return line, f"not valid YAML: {problem}{context}"


class _Reader:
    """Turns nodes into values and records where each stands."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def read_root(self, node: yaml.Node) -> None:
        line = node.start_mark.line + 1
        self.document.lines[()] = line
        self.document.value = self.value(node, (), line)

    def value(self, node: yaml.Node, path: Path_, line: int) -> Any:
        """`line` is the key's line, where an editor should jump to."""
        self.document.lines.setdefault(path, line)
        mark = getattr(node, "refused_mark", "")
        if mark:
            return self.document.refuse(line, path, _MARKS[mark.split()[0]].format(mark=mark))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return tuple(
                self.value(item, (*path, index), item.start_mark.line + 1)
                for index, item in enumerate(node.value)
            )
        assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind of node
        return self._scalar(node, path, line)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, path, line)
            if key is None:
                continue
            if key in values:
                where = (*path, key)
                message = f"given twice, first on line {first_line[key]}: remove one"
                self.document.problems.append(Problem(line, dotted(where), message))
                continue
            first_line[key] = line
            values[key] = self.value(value_node, (*path, key), line)
        return values

    def _key(self, node: yaml.Node, path: Path_, line: int) -> str | None:
        """The key, or None when it was refused."""
        if isinstance(node, yaml.ScalarNode) and not getattr(node, "refused_mark", ""):
            if node.style is None and node.value == "<<":
                self.document.problems.append(
                    Problem(line, dotted(path), "merge key '<<': write the keys out")
                )
                return None
            if _text_problem(node.value) is None:
                return str(node.value)
        message = "a key must be plain text"
        self.document.problems.append(Problem(line, dotted(path), message))
        return None

    def _scalar(self, node: yaml.ScalarNode, path: Path_, line: int) -> Any:
        text: str = node.value
        problem = _text_problem(text) if node.style is not None else _trap(text)
        if problem is not None:
            return self.document.refuse(line, path, problem)
        return text if node.style is not None else plain(text)


_MARKS = {
    "alias": "an alias (*name): write the value out",
    "anchor": "an anchor (&name): remove it, aliases are not read",
    "tag": "a {mark}: remove it, types follow from the key",
}

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def plain(text: str) -> Any:
    """The value of an unquoted scalar that is no trap: null, bool, int, float or text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


_TRAPS = {
    r"(?i)y|yes|n|no|on|off": "{text} is a truth value to some YAML readers and text to others: "
    'write true or false, or "{text}" in quotes',
    r"[-+]?(0[0-9_]+|0o[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+)": "{text} is octal, binary, hexadecimal "
    'or text, depending on the reader: write a decimal number, or "{text}" in quotes',
    r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?": "{text} is a number to base 60 to some YAML "
    'readers: write "{text}" in quotes',
    r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?": "{text} is a date to some YAML readers: "
    'write "{text}" in quotes',
    r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?": "{text} is a number to some YAML readers and text "
    "to others: leave out the underscores",
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)": "{text} is not a finite number",
    r"=": "= has a meaning of its own in YAML 1.1: quote it",
}
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
_EXPONENT_1_1 = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)[eE][-+][0-9]+")


def _trap(text: str) -> str | None:
    """Why an unquoted scalar is refused and what to write instead, or None."""
    if len(text) > LONGEST_PLAIN:
        return f"more than {LONGEST_PLAIN} characters: put the text in quotes"
    for pattern, message in _TRAPS.items():
        if re.fullmatch(pattern, text):
            return message.format(text=shorten(text))
    if _EXPONENT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            return f"{shorten(text)} is not a finite number"
        if not _EXPONENT_1_1.fullmatch(text):
            return (
                f"{shorten(text)} is a number to some YAML readers and text to others: "
                f'write {_decimal(number)}, or "{shorten(text)}" in quotes'
            )
    if len(text) > 400 and (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
        return "a number of more than 400 digits"
    return _text_problem(text)


def _decimal(number: float) -> str:
    """A number as YAML 1.1 and 1.2 both read it: 0.001, 100000, 1.0e-07."""
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    text = repr(number)
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _text_problem(text: str) -> str | None:
    """Text that no file name, no JSON and no terminal can carry."""
    for character in text:
        code = ord(character)
        if (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0:
            return f"control character U+{code:04X} in the text"
        if 0xD800 <= code < 0xE000:
            return f"half a surrogate pair (U+{code:04X}) in the text"
    return None


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a value, for a message; unprintable ones escaped."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
