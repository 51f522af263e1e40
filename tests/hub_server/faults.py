"""What goes wrong, as a plan that a test states or a JSON file holds."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tests.hub_server.messages import Answer

Side = Literal["request", "answer"]
CHUNKS = 8
"""Slow transfers are sent or read in so many pieces."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose ``METHOD path`` matches `pattern`.

    The first `skip` of them pass. Then, in the order in which it happens:

    - `expire_token`: the request's token is not good any more, now and later.
    - `private_bytes`: so much private storage has the namespace of the repository from now on.
    - `cut="request"`: half of the body is read, then the connection is closed (no effect).
    - `bytes_per_second`: body and answer come so slowly.
    - `corrupt="request"`: the body's bytes are changed before they take effect.
    - `move_head`: another commit comes first, on the branch that the request names, or main.
    - `drop="before"`: the connection is closed before the request takes effect.
    - `status` (with `message`, `headers`): an answer in place of the effect.
    - `drop="after"`: the connection is closed after the effect, without an answer.
    - `corrupt="answer"`: other bytes than the file's, other checksums than the listing's.
    - `cut="answer"`: the connection is closed after half of the answer.

    `during` is called at half of the body, `before` and `after` around the effect: a test kills
    the client there, or moves a branch.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    message: str = "planned"
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["before", "after"] | None = None
    cut: Side | None = None
    corrupt: Side | None = None
    bytes_per_second: float | None = None
    expire_token: bool = False
    move_head: bool = False
    private_bytes: int | None = None
    before: Callable[[], object] | None = None
    during: Callable[[], object] | None = None
    after: Callable[[], object] | None = None

    def matches(self, request: str) -> bool:
        """Whether it is this request's turn; counts."""
        if self.times <= 0 or not re.search(self.pattern, request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


NONE = Fault("", times=0)
"""Nothing goes wrong."""


class Gate:
    """Holds a request until the test lets it go; the test waits for its arrival."""

    def __init__(self) -> None:
        self._arrived, self._open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._arrived.set()
        self._open.wait(60)

    def wait(self, seconds: float = 30) -> None:
        """Until the request is here; TimeoutError."""
        if not self._arrived.wait(seconds):
            raise TimeoutError("the request did not arrive")

    def open(self) -> None:
        self._open.set()


def corrupt_request(body: bytes) -> bytes:
    """Other bytes of the same kind: a file of the commit, or the body itself."""
    lines = body.splitlines()
    for index, line in reversed(list(enumerate(lines))):
        if line.startswith(b'{"key": "file"'):
            value = json.loads(line)
            content = base64.b64decode(value["value"]["content"]) + b"?"
            value["value"]["content"] = base64.b64encode(content).decode()
            lines[index] = json.dumps(value).encode()
            return b"\n".join(lines)
    return body[:-1] + bytes([body[-1] ^ 1]) if body else body


def corrupt_answer(answer: Answer) -> Answer:
    """Checksums in JSON, or the last byte of a file, are others."""
    if answer.content is None:
        return replace(answer, value=_other_checksums(answer.value))
    content = answer.content
    return replace(answer, content=content[:-1] + bytes([content[-1] ^ 1]) if content else content)


def _other_checksums(value: Any) -> Any:
    if isinstance(value, list):
        return [_other_checksums(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _other_checksums(item) for key, item in value.items()}
    if isinstance(changed.get("oid"), str):
        oid = changed["oid"]
        changed["oid"] = ("1" if oid[0] == "0" else "0") + oid[1:]
    return changed


def pieces(content: bytes, bytes_per_second: float | None) -> Iterator[bytes]:
    """The content at once, or slowly."""
    size = len(content) if bytes_per_second is None else max(len(content) // CHUNKS, 1)
    for start in range(0, len(content), size or 1):
        piece = content[start : start + size]
        if bytes_per_second is not None:
            time.sleep(len(piece) / bytes_per_second)
        yield piece


class PlanError(Exception):
    """A fault plan that cannot be used; the message says where and why."""


KINDS: dict[str, tuple[type, ...]] = {
    "pattern": (str,),
    "times": (int,),
    "skip": (int,),
    "status": (int,),
    "message": (str,),
    "headers": (dict,),
    "drop": (str,),
    "cut": (str,),
    "corrupt": (str,),
    "bytes_per_second": (int, float),
    "expire_token": (bool,),
    "move_head": (bool,),
    "private_bytes": (int,),
}
CHOICES = {
    "drop": ("before", "after"),
    "cut": ("request", "answer"),
    "corrupt": ("request", "answer"),
}


def load_plan(path: Path) -> tuple[Fault, ...]:
    """The faults of a JSON file: a list of objects with :class:`Fault`'s fields, or PlanError."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}") from error
    if not isinstance(plan, list):
        raise PlanError(f'{path} must hold a list: [{{"pattern": "POST .*/commit/", ...}}]')
    problems = [
        f"{path}, fault {number}: {problem}"
        for number, fault in enumerate(plan, 1)
        for problem in _problems(fault)
    ]
    if problems:
        raise PlanError("\n".join(problems))
    return tuple(Fault(**fault) for fault in plan)


def _problems(fault: Any) -> list[str]:
    if not isinstance(fault, dict):
        return ["is not an object"]
    if unknown := sorted(set(fault) - set(KINDS)):
        return [f"{', '.join(unknown)} is not one of {', '.join(KINDS)}"]
    found = [] if "pattern" in fault else ["needs a pattern for METHOD and path"]
    for name, value in fault.items():
        kinds = KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found.append(f"{name} must be {kinds[0].__name__}, not {value!r}")
        elif name in CHOICES and value not in CHOICES[name]:
            found.append(f"{name} must be {' or '.join(CHOICES[name])}, not {value!r}")
        elif name == "pattern":
            try:
                re.compile(value)
            except re.error as error:
                found.append(f"pattern {value!r} is not a regular expression: {error}")
        elif name == "bytes_per_second" and value <= 0:
            found.append("bytes_per_second must be above 0")
    if not found and set(fault) <= {"pattern", "times", "skip"}:
        effects = [each.name for each in fields(Fault)][3:13]
        found.append(f"says nothing that goes wrong: {', '.join(effects)}")
    return found
