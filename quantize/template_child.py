"""Renders a stranger's chat template: a program of its own, so that it can be ended.

`python -I template_child.py REQUEST RESULT`. Needs jinja2 alone. The request is JSON: `template`,
`variables` (special tokens by name) and `conversations` (lists of messages). The result is a list,
one entry a conversation: `text`, or `error` and `line`. The environment is the one in which
transformers renders (`utils/chat_template_utils.py`).
"""

from __future__ import annotations

import json
import resource
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 20
LONGEST_TEXT = 100_000


class Generation(Extension):
    """The tag `generation`, which marks what an assistant says and renders its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> Any:
        """The body alone, in the form that Jinja has for a tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each conversation."""
    try:
        template = environment().from_string(request["template"])
    except jinja2.TemplateSyntaxError as error:
        found = {"error": f"syntax error: {error.message}", "line": error.lineno}
        return [found for _ in request["conversations"]]
    except Exception as error:
        return [_failed(error) for _ in request["conversations"]]
    results = []
    for messages in request["conversations"]:
        try:
            text = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **request["variables"],
            )
            results.append({"text": text[:LONGEST_TEXT]})
        except Exception as error:
            results.append(_failed(error))
    return results


def _failed(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    said = str(error) or type(error).__name__
    return {"error": said[:300], "line": (lines[-1] if lines else 0) or 0}


def main(request: Path, result: Path) -> None:
    """Read, render, write; within bounds that no sound template meets."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    rendered = render(json.loads(request.read_text(encoding="utf-8")))
    result.write_text(json.dumps(rendered), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
