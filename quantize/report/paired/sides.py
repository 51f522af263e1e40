"""One measurement as the comparison reads it: its record and the files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantize.errors import SourceError
from quantize.records import Answered, MeasureRecord, Perplexity, Task
from quantize.report.paired.divergence import TokenLogprobs
from quantize.store import Artifact

TextName = Literal["perplexity", "own_perplexity"]
TEXTS: dict[TextName, str] = {
    "perplexity": "token_logprobs.npz",
    "own_perplexity": "own_token_logprobs.npz",
}
"""Each text of a measure record, and the file of its tokens."""


@dataclass(frozen=True)
class Side:
    """A measure artifact."""

    artifact: Artifact
    _samples: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def record(self) -> MeasureRecord:
        """Its `record.json`."""
        record: MeasureRecord = self.artifact.json("record.json")
        return record

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Its tasks by name, in the suite's order."""
        return {task["name"]: task for task in self.record["tasks"]}

    def text(self, name: TextName) -> Perplexity | None:
        """What the record says of a text; None where it was not measured."""
        return self.record.get(name)

    def logprobs(self, name: TextName) -> TokenLogprobs:
        """What the server said of a text's tokens."""
        return TokenLogprobs.load(_file(self.artifact, TEXTS[name]))

    def documents(self, name: TextName) -> list[str]:
        """The documents of a text that were scored."""
        lines = read_lines(self.artifact, TEXTS[name].replace(".npz", ".jsonl"))
        return [str(line["text"]) for line in lines]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """The answers to a task, one a document; read once, several comparisons ask for them."""
        if task not in self._samples:
            self._samples[task] = read_lines(self.artifact, f"samples/{task}.jsonl")
        return self._samples[task]

    def answers(self) -> list[Answered]:
        """The generations of `health.jsonl`, one a prompt."""
        answers: list[Any] = read_lines(self.artifact, "health.jsonl")
        return answers


def read_lines(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    """The objects of an artifact's .jsonl file; SourceError if it is absent or damaged."""
    path = _file(artifact, name)
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError as error:
        raise SourceError(f"{path} cannot be read: {error}", "quantize store verify") from error


def _file(artifact: Artifact, name: str) -> Path:
    try:
        return artifact.file(name)
    except KeyError:
        raise SourceError(
            f"{artifact.path} has no file {name}, and its record speaks of it",
            "quantize store verify",
        ) from None
