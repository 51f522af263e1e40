"""Does a checkpoint's chat template render a plain message? Tried in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantize
from quantize.checkpoint import Checkpoint
from quantize.findings import Finding
from quantize.model_files import chat_template, special_tokens
from quantize.process import Process
from quantize.protocol import write_json

CHILD = Path(quantize.__file__).parent / "template_child.py"
LIMIT_SECONDS = 15.0
WORDS = "Where does the ferry cross"
"""What the user says; a template that leaves it out renders something else."""

HINT = "take chat_template of the model that was fine-tuned, or correct it"


def _message(role: str, text: str, *, parts: bool = False) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [_message("user", WORDS)],
    [_message("system", "Be brief."), _message("user", WORDS)],
    [_message("user", WORDS, parts=True)],
    [_message("user", WORDS), _message("assistant", "At the weir."), _message("user", WORDS)],
)
"""What is tried; one that renders is enough: some templates insist on a system message, or take
content in parts alone."""


@dataclass(frozen=True)
class Rendered:
    """What became of each conversation; `stopped` where the process had to be ended."""

    results: tuple[dict[str, Any], ...] = ()
    stopped: str = ""


def check_chat_template(checkpoint: Checkpoint) -> list[Finding]:
    """A finding where no plain conversation renders; nothing where there is no template."""
    template = chat_template(checkpoint.folder)
    if template is None:
        return []
    rendered = render(template, special_tokens(checkpoint.folder))
    if rendered.stopped:
        return [Finding(f"the chat template {rendered.stopped}", HINT)]
    texts = [result["text"] for result in rendered.results if "text" in result]
    if any(WORDS in text for text in texts):
        return []
    if texts:
        message = "the chat template renders a conversation without what the user said"
        return [Finding(message, HINT)]
    first = rendered.results[0]
    where = f" (line {first['line']} of it)" if first.get("line") else ""
    return [
        Finding(f"the chat template does not render a plain message: {first['error']}{where}", HINT)
    ]


def render(
    template: str,
    variables: dict[str, str],
    conversations: Sequence[list[dict[str, Any]]] = CONVERSATIONS,
    limit_seconds: float = LIMIT_SECONDS,
) -> Rendered:
    """Every conversation through the template, in a process that is ended."""
    with tempfile.TemporaryDirectory(prefix="quantize-template-") as scratch:
        folder = Path(scratch)
        request, result = folder / "request.json", folder / "result.json"
        write_json(
            request,
            {"template": template, "variables": variables, "conversations": conversations},
        )
        command = [sys.executable, "-I", str(CHILD), str(request), str(result)]
        until = time.monotonic() + limit_seconds
        with Process(command, log=folder / "log") as process:
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            if process.poll() is None:
                return Rendered(stopped=f"does not end within {limit_seconds:.0f} s")
        if not result.is_file():
            return Rendered(stopped=f"cannot be rendered: {_last_line(process)}")
        return Rendered(tuple(json.loads(result.read_text(encoding="utf-8"))))


def _last_line(process: Process) -> str:
    lines = process.tail().splitlines()
    return lines[-1][:300] if lines else "it needs more memory or time than any sound one"
