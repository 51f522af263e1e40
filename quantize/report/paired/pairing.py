"""Answers of two or more measurements to the same documents of one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize.errors import SourceError
from quantize.report.paired.intervals import Floats, Integers

SAME_QUESTIONS = (
    "compare the tokenizers and chat templates of the two checkpoints: the audit names what differs"
)
Sample = Mapping[str, Any]
"""A line of `samples/<task>.jsonl`."""


@dataclass(frozen=True)
class Paired:
    """One task's answers, in the first side's order of documents."""

    scores: Floats  # (sides, documents)
    cluster: Integers | None  # (documents,); None where all are independent
    samples: tuple[list[Sample], ...]  # by side

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(np.isin(self.scores, (0, 1)).all())


def pair(task: str, **sides: Sequence[Sample]) -> Paired:
    """Join the sides' samples by document; the keywords name the sides in messages.

    Raises SourceError if documents or their rendered prompts differ, if a score is not a finite
    number, or if there are fewer than two documents (or clusters): then no interval exists.
    """
    by_document = {side: _by_document(task, samples) for side, samples in sides.items()}
    first_side, first = next(iter(by_document.items()))
    for side, samples in by_document.items():
        _same_documents(task, (first_side, first), (side, samples))
    if len(first) < 2:
        raise SourceError(f"task {task} has {_count(len(first), 'document')}: no interval exists")
    rows = tuple([samples[document] for document in first] for samples in by_document.values())
    scores = np.array([[sample["score"] for sample in row] for row in rows], dtype=np.float64)
    if not np.isfinite(scores).all():
        side, place = np.argwhere(~np.isfinite(scores))[0]
        raise SourceError(
            f"task {task}: the {list(sides)[side]}'s score of document {list(first)[place]} "
            "is not a finite number"
        )
    return Paired(scores, _clusters(task, rows[0]), rows)


def _by_document(task: str, samples: Sequence[Sample]) -> dict[Any, Sample]:
    """Samples by document id; an id that comes twice is an error."""
    found: dict[Any, Sample] = {}
    for sample in samples:
        if sample["doc"] in found:
            raise SourceError(f"task {task} has two answers to document {sample['doc']}")
        found[sample["doc"]] = sample
    return found


def _same_documents(
    task: str, first: tuple[str, dict[Any, Sample]], second: tuple[str, dict[Any, Sample]]
) -> None:
    for document in {**first[1], **second[1]}:
        for side, samples in (first, second):
            if document not in samples:
                raise SourceError(
                    f"task {task}: the {side} has no answer to document {document}", SAME_QUESTIONS
                )
        if first[1][document]["prompt_sha256"] != second[1][document]["prompt_sha256"]:
            raise SourceError(
                f"task {task}: the {first[0]} and the {second[0]} were asked different prompts "
                f"for document {document}",
                SAME_QUESTIONS,
            )


def _clusters(task: str, samples: Sequence[Sample]) -> Integers | None:
    """Numbers (documents,) of the clusters; a document without one is a cluster of its own."""
    names = [sample["cluster"] for sample in samples]
    if not any(names):
        return None
    keys = [(name, -1 if name else place) for place, name in enumerate(names)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < 2:
        raise SourceError(
            f"task {task}: all documents belong to the cluster {names[0]!r}: no interval exists",
            "name another field as the task's `cluster` in the suite, or none",
        )
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
