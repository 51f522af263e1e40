"""What keeps a local file of rows or text from being used, found before anything is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.untrusted import open_regular, what_it_is
from quantize.workers.rows import BadRow, json_lines, kind_of, text_lines

SCAN_LIMIT_BYTES = 64 << 20
"""How much of a calibration file is parsed beforehand; the calibrate stage reads the rest."""

HEAD_BYTES = 1 << 20
"""How much of a calibration file tells whether it holds conversations."""


def check_calibration(path: Path, *, has_chat_template: bool | None) -> list[Finding]:
    """What keeps a local calibration file from being used, with line numbers.

    `has_chat_template` is None where it is not known yet.
    """
    if not path.exists():
        return [Finding(f"the calibration file {path} does not exist", "correct its path")]
    try:
        with open_regular(path) as file:
            head = file.read(512)
        if path.suffix == ".parquet":
            return _check_parquet(path)
        if (what := what_it_is(head)) is not None and head:
            hint = "give it as .jsonl (one object a line), .parquet or .txt"
            return [Finding(f"the calibration file {path} is {what}", hint)]
        if path.suffix == ".txt":
            return _check_text(path)
        return _check_json_lines(path, has_chat_template)
    except BadRow as error:
        return [Finding(f"{path}:{error.line}: {error.fault}", error.hint)]
    except SourceError as error:
        return [Finding.of(error)]


def has_messages(path: Path) -> bool:
    """Whether one of the first rows of a JSON lines file is a conversation."""
    if path.suffix in (".parquet", ".txt"):
        return False
    try:
        return any(kind_of(row)[0] == "messages" for _, row in json_lines(path, HEAD_BYTES))
    except (BadRow, SourceError):  # told where the file is checked
        return False


def _check_json_lines(path: Path, has_chat_template: bool | None) -> list[Finding]:
    """One JSON object a line, with `messages` or `text`; blank lines do not count."""
    where: dict[str, int] = {}  # first line of each kind
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for number, row in json_lines(path, SCAN_LIMIT_BYTES):
        found, reason = kind_of(row)
        kinds[found or "neither"] += 1
        reasons[reason] += found is None
        where.setdefault(found or "neither", number)
    if not kinds:
        return [_empty(path)]
    findings = []
    if not kinds["messages"] and not kinds["text"]:
        reason = reasons.most_common(1)[0][0]
        findings.append(
            Finding(
                f"{path}:{where['neither']}: {reason}; no other row is usable either",
                "rename the column, or write the file anew: one object a line",
            )
        )
    if kinds["messages"] and has_chat_template is False:
        findings.append(
            Finding(
                f"{path}:{where['messages']}: {kinds['messages']} rows have `messages`, but the "
                "checkpoint has no chat template",
                "add chat_template.jinja to the checkpoint, or give rows with `text`",
            )
        )
    return findings


def _check_text(path: Path) -> list[Finding]:
    blank = True
    for _, text in text_lines(path):
        blank = blank and not text.strip()
    return [_empty(path)] if blank else []


def _check_parquet(path: Path) -> list[Finding]:
    """The magic bytes at both ends; columns are the calibrate stage's to read."""
    size = path.stat().st_size
    if size == 0:
        return [_empty(path)]
    with open_regular(path) as file:
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    footer = int.from_bytes(tail[:4], "little")  # bytes of metadata before these eight
    if size >= 12 and head == tail[4:] == b"PAR1" and footer <= size - 12:
        return []
    return [Finding(f"{path} is not a complete parquet file", "download or write it again")]


def _empty(path: Path) -> Finding:
    return Finding(
        f"the calibration file {path} is empty", "give it rows: one JSON object with `text` a line"
    )
