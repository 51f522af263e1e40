"""Text that others wrote, made fit for a terminal: it may not move the cursor or change colours."""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, DEL, C1: escape sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # reorder what is read (CVE-2021-42574)
    "\u2028\u2029\ud800-\udfff]"  # line ends that some show and some do not; no characters at all
)


def printable(text: str) -> str:
    r"""`text` with control characters written out (``\x1b``); tabs and line feeds stay.

    The result can always be encoded as UTF-8.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, limit: int = 120) -> str:
    """`text` on one line and at most `limit` characters long, for a message."""
    line = printable(text[: limit + 1]).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= limit else line[: limit - 3] + "..."
