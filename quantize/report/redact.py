"""What leaves the machine names no place on it: paths become base names, tokens go."""

from __future__ import annotations

import re
from typing import Any

_PATH = re.compile(
    r"""(?:(?<=[\s="'(\[{,;:<>|`])|^)  # after white space, = in an option, a quote ...
    (?:file://)?
    (?:
        ~[\w.-]*/                      # a home folder
      | /(?=[^\s/])                    # the root, but not the two slashes of an address
      | [A-Za-z]:[\\/]                 # a drive
    )
    [^\s"',;)\]}<>|`]*
    (?:[ ][^\s"',;/\\]*[\\/][^\s"',;)\]}<>|`]*)*  # a space in a folder's name
    """,
    re.VERBOSE,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")

_VERBATIM = frozenset({"prompt", "answer", "target", "response"})
"""What models were asked and said is evidence, slashes or not."""


def redact(value: Any) -> Any:
    """`value` (JSON) without absolute paths, home folders and Hub tokens, keys included.

    A path is reduced to its last part, wherever it stands in a string. What was asked and
    answered keeps its slashes. Applying it twice changes nothing more.
    """
    if isinstance(value, str):
        return _without_paths(_without_tokens(value))
    if isinstance(value, dict):
        return {redact(key): _entry(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def _entry(key: str, item: Any) -> Any:
    verbatim = key in _VERBATIM and isinstance(item, str)
    return _without_tokens(item) if verbatim else redact(item)


def _without_tokens(text: str) -> str:
    return _TOKEN.sub("hf_***", text)


def _without_paths(text: str) -> str:
    return _PATH.sub(lambda found: base_name(found[0]), text)


def base_name(path: str) -> str:
    """The last part of a path of any system, or nothing for a bare root, drive or home."""
    last = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return "" if last.startswith("~") or last.endswith(":") else last
