"""What the Hub checks of a card's front matter: errors refuse it, warnings are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.hub_server.accounts import Refused

LICENSES = frozenset(Path(__file__).with_name("licenses.txt").read_text().split())

NAMES: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
NAME_OR_NAMES: dict[str, Any] = {"anyOf": [{"type": "string"}, NAMES]}
METRIC: dict[str, Any] = {
    "type": "object",
    "required": ["type", "value"],
    "properties": {"type": {"type": "string"}, "name": {"type": "string"}},
}
RESULT: dict[str, Any] = {
    "type": "object",
    "required": ["task", "dataset", "metrics"],
    "properties": {
        "task": {"type": "object", "required": ["type"]},
        "dataset": {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"type": "string"}, "name": {"type": "string"}},
        },
        "metrics": {"type": "array", "minItems": 1, "items": METRIC},
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "license_name": {"type": "string", "pattern": r"^[a-z0-9][a-z0-9.-]*$"},
        "license_link": {"type": "string"},
        "language": NAME_OR_NAMES,
        "tags": NAMES,
        "datasets": NAME_OR_NAMES,
        "library_name": {"type": "string"},
        "pipeline_tag": {"type": "string"},
        "base_model": NAME_OR_NAMES,
        "base_model_relation": {"enum": ["adapter", "merge", "quantized", "finetune"]},
        "model-index": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "results"],
                "properties": {
                    "name": {"type": "string"},
                    "results": {"type": "array", "items": RESULT},
                },
            },
        },
    },
}


@dataclass(frozen=True)
class Findings:
    """What is wrong with a card's metadata."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check_card(text: str) -> Findings:
    """The findings of ``/api/validate-yaml``."""
    try:
        card = front_matter(text)
    except Refused as refused:
        return Findings(errors=(refused.message,))
    if card is None:
        return Findings(warnings=("empty or missing yaml metadata in repo card",))
    shape = jsonschema.Draft202012Validator(SCHEMA)
    errors = [
        f'"{_place(error.absolute_path)}" {error.message}' for error in shape.iter_errors(card)
    ]
    return Findings(tuple(errors) + _names(card), _lacking(card))


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML between the first two ``---`` lines, or None; Refused if it is not a mapping."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return None
    try:
        value = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise Refused(400, f"Invalid YAML metadata: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "YAML metadata is not a mapping")
    return value


def _names(card: dict[str, Any]) -> tuple[str, ...]:
    """Values that must be known names or look like one."""
    found = []
    licenses = card.get("license", [])
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES:
            found.append(f'"license" {name!r} is not one of the licenses that the Hub knows')
    languages = card.get("language", [])
    for name in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(name)):
            found.append(f'"language" {name!r} is not an ISO 639 code, code or multilingual')
    models = card.get("base_model", [])
    for name in models if isinstance(models, list) else [models]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            found.append(f'"base_model" {name!r} is not the id of a repository')
    return tuple(found)


def _lacking(card: dict[str, Any]) -> tuple[str, ...]:
    if card.get("license") == "other" and not card.get("license_name"):
        return ('"license_name" should be given with the license "other"',)
    return ()


def _place(path: Any) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
