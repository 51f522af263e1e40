"""Python that a checkpoint brings along: run only where the recipe names what was read.

`model.trust_remote_code` is a pin, not a switch: for a repository on the Hub the commit whose code
one has read, for a folder the digest of its Python files. Other code than that is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.keys import digest
from quantize.model_files import CODE, any_match, unsound_files
from quantize.untrusted import TEXT_LIMIT_BYTES, read_bytes, read_json_object

LET_IN = "let in"
"""Instead of a pin: the checkpoint has passed the fetch stage, or is our own."""

KEYS = ("auto_map", "custom_pipelines")


def code_files(folder: Path) -> list[str]:
    """Names of the Python files beside the weights: any of them may be imported by another."""
    return sorted(path.name for path in folder.glob("*.py"))


def code_digest(folder: Path) -> str:
    """sha256 (64 hex digits) over names and contents of :func:`code_files`."""
    import hashlib

    contents = {
        name: hashlib.sha256(read_bytes(folder / name, TEXT_LIMIT_BYTES)).hexdigest()
        for name in code_files(folder)
    }
    return digest(contents)


def check_code(
    folder: Path, files: Sequence[str], pin: str | None, commit: str | None = None
) -> list[Finding]:
    """A checkpoint that wants code run, and a `pin` (see the module) that is not of this code.

    `commit`: of the repository on the Hub that the folder comes from; its code is not read then.
    """
    if pin == LET_IN:
        return []
    try:
        found = _signs(folder, files)
        if not found and pin is None:
            return []
        unsound = unsound_files(folder, ("*.py",))
        if unsound:
            return unsound
        actual = commit or code_digest(folder)
    except SourceError as error:
        return [Finding.of(error)]
    if not found:
        message = f"model.trust_remote_code is set, and {folder} brings no code"
        return [Finding(message, "remove it")]
    if pin == actual:
        return []
    brings = f"the checkpoint brings Python code ({', '.join(found)})"
    if pin is None:
        return [
            Finding(
                f"{brings}, which is never run unread",
                "use an architecture that transformers has, and remove auto_map and the code; or "
                f"read {', '.join(code_files(folder)) or 'the code'} and set "
                f"model.trust_remote_code: {actual}",
            )
        ]
    return [
        Finding(
            f"{brings} that is not the one which model.trust_remote_code names ({pin[:12]}...)",
            f"read it again, and set model.trust_remote_code: {actual}",
        )
    ]


def _signs(folder: Path, files: Sequence[str]) -> list[str]:
    found = [name for name in code_files(folder) if any_match(name, CODE)]
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if name not in files:
            continue
        try:
            keys: dict[str, Any] = read_json_object(folder / name)
        except SourceError:
            continue  # reported where it is read
        found += [f"{key} in {name}" for key in KEYS if key in keys]
    return found
