"""Rows of calibration data: read a line at a time, and told apart; the core looks first.

Standard library only. A *file* that is not what its name says (not UTF-8, not JSON, a line without
end) is refused, with the line. A *row* that says nothing usable is skipped and counted: data sets
hold such rows. docs/security.md has the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

LINE_LIMIT_BYTES = 16 << 20
"""Of a row. Three million words; what is longer is no row, and would be held in memory whole."""

Kind = Literal["messages", "text"]


class BadRow(ValueError):
    """A line that makes the whole file unusable; `line` from 1."""

    def __init__(self, line: int, fault: str, hint: str) -> None:
        super().__init__(fault)
        self.line, self.fault, self.hint = line, fault, hint


def json_lines(path: Path, limit_bytes: int | None = None) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not blank, until `limit_bytes` have been read."""
    read = 0
    for number, raw in text_lines(path):
        read += len(raw)
        if limit_bytes is not None and read > limit_bytes:
            return
        if not raw.strip():
            continue
        try:
            yield number, json.loads(raw)
        except (ValueError, RecursionError) as error:
            hint = "each line is one object with `messages` or `text`"
            raise BadRow(number, f"not JSON: {error}", hint) from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line from 1, text with its line feed) of a UTF-8 file, with or without a byte order mark."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_LIMIT_BYTES + 1):
            number += 1
            if len(raw) > LINE_LIMIT_BYTES:
                fault = f"a line of more than {LINE_LIMIT_BYTES >> 20} MiB"
                raise BadRow(number, fault, "put one row on each line")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 (byte 0x{raw[error.start]:02x})"
                raise BadRow(number, fault, "convert the file to UTF-8") from error
            yield number, text


def kind_of(row: Any) -> tuple[Kind | None, str]:
    """What a row offers, and for None why it is skipped."""
    if not isinstance(row, dict):
        return None, "not an object"
    messages, text = row.get("messages"), row.get("text")
    if messages is not None and messages != []:
        fault = _fault_of_messages(messages)
        return (None, fault) if fault else ("messages", "")
    if text is None:
        return None, "neither `messages` nor `text`"
    if not isinstance(text, str):
        return None, "`text` is no text"
    if not text.strip():
        return None, "empty text"
    return (None, HALF_CHARACTER) if has_half_character(text) else ("text", "")


HALF_CHARACTER = "half a character (a lone surrogate)"


def _fault_of_messages(messages: Any) -> str:
    """Roles are the template's to judge; that there are texts under `role` and `content` is not."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return "`messages` is no list of objects"
    for turn in messages:
        if not isinstance(turn.get("role"), str):
            return "a message without a `role`"
        content = turn.get("content")
        # None: a turn that only calls a tool; a list: the parts of a multimodal message
        if not isinstance(content, str | list | None):
            return "a message whose `content` is no text"
        if has_half_character(json.dumps(turn, ensure_ascii=False, default=str)):
            return HALF_CHARACTER
    return ""


def has_half_character(text: str) -> bool:
    r"""Whether a text cannot be written as UTF-8: JSON may hold ``\ud800`` alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
