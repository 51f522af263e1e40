"""Change values of a YAML file and keep the rest of its text, comments included.

PyYAML says where each node stands in the text but cannot write comments. So a value is replaced in
its span, a missing key is added below its block's last one, and what comes out is read again: it
must hold exactly what was wanted. Where a file's form is too unusual for that, it is written anew,
without its comments.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml

from quantize.yaml_values import parse

KeyPath = tuple[str, ...]

REMOVED: Any = object()
"""As a new value: the key goes."""

WIDTH = 100


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever our reader would refuse it plain or take it for a number."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key, too."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[\w./+-]+", text) is not None and parse(text).value == text
    style = None if plain else "'" if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def write_yaml(value: Any, *, flow: bool | None = None) -> str:
    """YAML text of plain values; `flow` None writes the innermost lists and mappings in a line."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=flow,
        width=2**31,
        allow_unicode=True,
    )
    return text.removesuffix("...\n").rstrip("\n")


def changed(text: str, changes: Mapping[KeyPath, Any]) -> str:
    """YAML `text` with the values at some key paths replaced, added or REMOVED, in order.

    `text` must be readable without problems. Blocks that a path needs are made.
    """
    wanted = copy.deepcopy(parse(text).value)
    edited = text
    for path, value in changes.items():
        _assign(wanted, path, value)
        edited = _edit(edited, path, value)
    result = parse(edited)
    if result.problems or result.value != _plain(wanted):
        edited = write_yaml(wanted) + "\n"
        assert parse(edited).value == _plain(wanted), "our own writer and reader disagree"
    return edited


def _assign(block: dict[str, Any], path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(block.get(part), dict):
            block[part] = {}
        block = block[part]
    if value is REMOVED:
        block.pop(path[-1], None)
    else:
        block[path[-1]] = value


def _plain(value: Any) -> Any:
    """Lists as the tuples that the reader makes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _edit(text: str, path: KeyPath, value: Any) -> str:
    """The text with one change; the text as it is where its form is not one that we edit."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for depth, part in enumerate(path):
        if not isinstance(node, yaml.MappingNode) or node.flow_style or not node.value:
            return text
        found = next((pair for pair in node.value if pair[0].value == part), None)
        if found is None:
            if value is REMOVED:
                return text
            for missing in reversed(path[depth + 1 :]):
                value = {missing: value}
            return _added(text, node, part, value)
        key, node = found
    if value is REMOVED:
        return _removed(text, key, node)
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return _edit(_removed(text, key, node), path, value)  # as blocks, below the other keys
    return _replaced(text, key, node, value)


def _end(node: yaml.Node) -> int:
    """Where a value ends; PyYAML's end of a block is where the next key begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _replaced(text: str, key: yaml.Node, node: yaml.Node, value: Any) -> str:
    start, end = int(node.start_mark.index), _end(node)
    new = write_yaml(value, flow=True)
    indent = int(key.start_mark.column)
    if isinstance(value, list | tuple) and indent + len(f"{key.value}: {new}") > WIDTH:
        items = "".join(f"{' ' * (indent + 2)}{write_yaml(v, flow=True)},\n" for v in value)
        new = f"[\n{items}{' ' * indent}]"
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        # A block begins on a line of its own: the flow form goes behind the key, before a comment.
        key_end = int(key.end_mark.index)
        comment = re.search(r"#.*", text[key_end:start])
        tail = f" {comment[0].rstrip()}" if comment else ""
        return f"{text[:key_end]}: {new}{tail}{text[end:]}"
    gap = " " if text[start - 1] == ":" else ""  # `key:` without a value
    return text[:start] + gap + new + text[end:]


def _removed(text: str, key: yaml.Node, node: yaml.Node) -> str:
    line = text.rfind("\n", 0, int(key.start_mark.index)) + 1
    return text[:line] + text[_end_of_line(text, _end(node)) + 1 :]


def _added(text: str, block: yaml.MappingNode, name: str, value: Any) -> str:
    """A key below the block's last one, with mappings and lists of mappings as blocks."""
    indent = " " * int(block.value[0][0].start_mark.column)
    at = _end_of_line(text, _end(block))
    # A mapping of scalars alone would become one line in braces.
    text_of = write_yaml({name: value}, flow=None if isinstance(value, dict | list) else False)
    lines = text_of.split("\n")
    return text[:at] + "".join(f"\n{indent}{line}" for line in lines) + text[at:]
