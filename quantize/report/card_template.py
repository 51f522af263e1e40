"""The card's template, the shipped one or a user's own: checked, and rendered in a sandbox.

A template of a stranger runs nothing: attributes that lead to Python's internals are refused, and
no file but the package's own templates can be extended or included. It prints no string that
passed none of the filters of :mod:`quantize.report.markdown`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from quantize.errors import SourceError
from quantize.findings import Finding
from quantize.report.markdown import environment

SHIPPED = "card.md.j2"
VARIABLES = frozenset(
    (
        *("record", "front", "method", "text", "size_ratio", "ratio", "ratio_low", "ratio_high"),
        *("recovery", "verdict", "size_rows", "memory", "quality_rows", "plots", "verdict_rows"),
        *("retention_rows", "health_rows", "noise", "answers", "smoke", "serving_rows"),
        *("gguf", "vllm"),
        *("parallel_sizes", "sglang", "sglang_caution", "transformers_code", "verify_command"),
        *("audit", "engine", "loaded_with"),
        *("calibration", "versions", "recipe_yaml"),
    )
)
"""What a template may print, see :func:`quantize.report.card.card_variables`."""

HINT = "docs/reading-a-card.md lists the names, filters and blocks that a template may use"


def card_template(text: str | None, name: str = SHIPPED) -> Callable[[Mapping[str, Any]], str]:
    """A function from the variables to the card; without a text that of the shipped template."""
    templates = environment()
    if text is None:
        shipped = templates.get_template(SHIPPED)
        return lambda variables: shipped.render(variables)
    try:
        template = templates.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"{name}:{error.lineno}: {error.message}", HINT) from error

    def render(variables: Mapping[str, Any]) -> str:
        try:
            return template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise SourceError(f"{name}:{_line(error)}: {error}", HINT) from error

    return render


def _line(error: Exception) -> int:
    """The template's line that failed: Jinja puts a template's own lines into tracebacks."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return lines[-1] or 0 if lines else 0


def read_template(path: Path) -> str:
    """The text of a template's file; a SourceError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot read the card's template {path}: {error}", "correct publish.card_template"
        ) from error


def check_template(path: Path) -> list[Finding]:
    """What can be seen without a record: syntax, unknown filters, names that no card has."""
    try:
        text = read_template(path)
        card_template(text, str(path))
    except SourceError as error:
        return [Finding.of(error)]
    tree = environment().parse(text)
    unknown = meta.find_undeclared_variables(tree) - VARIABLES
    found = [
        Finding(f"{path}:{name.lineno}: a card has no {name.name!r}", HINT)
        for name in tree.find_all(nodes.Name)
        if name.name in unknown and name.ctx == "load"
    ]
    others = [
        node
        for kind in (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
        for node in tree.find_all(kind)
        if getattr(getattr(node, "template", None), "value", None)
        != SHIPPED  # no constant: a name that is computed
    ]
    return found + [
        Finding(f"{path}:{node.lineno}: there is no template but {SHIPPED!r}", HINT)
        for node in others
    ]
