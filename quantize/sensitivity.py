"""The sensitivity record: what each scheme would cost each linear, in bytes and in error.

The streaming engine writes it beside the checkpoint (`sensitivity.json` of a compress artifact). A
linear's error is tr(dW H dWᵀ) / tr(W H Wᵀ) with H = sum of x xᵀ over the calibration tokens,
dimensionless: the squared error of its output relative to the squared output, for weights rounded
to nearest. Linears that a server fuses are one unit and get the same scheme; a unit's error is the
sum over its linears. This module opens no file and knows no recipe.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize.errors import ToolError, UsageError

GroupSize = Annotated[int, Field(gt=0)] | Literal["channel"]


class _Block(BaseModel):
    """Strict and frozen: a missing or misspelt key is an error, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Candidate(_Block):
    """One linear in one scheme."""

    scheme: str
    group_size: GroupSize | None
    bytes: Annotated[int, Field(gt=0)]  # of all its tensors on disk
    error: Annotated[float, Field(ge=0)]  # relative squared output error

    @property
    def choice(self) -> Choice:
        """What it is a candidate of."""
        return Choice(self.scheme, self.group_size)


class Linear(_Block):
    """One linear module of the decoder layers."""

    name: str
    layer: Annotated[int, Field(ge=0)]
    unit: str
    shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]  # (out, in)
    candidates: tuple[Candidate, ...]

    @property
    def parameters(self) -> int:
        """Elements of its weight; a bias is never quantized and not counted."""
        return self.shape[0] * self.shape[1]

    @model_validator(mode="after")
    def _candidates_are_a_choice(self) -> Linear:
        choices = [candidate.choice for candidate in self.candidates]
        if len(set(choices)) < len(choices) or BF16 not in choices:
            raise ValueError(f"candidates of {self.name} must differ, and BF16 be among them")
        return self


class Sensitivity(_Block):
    """What the streaming engine writes to `sensitivity.json`."""

    version: Literal[1]
    tokens: Annotated[int, Field(gt=0)]  # calibration tokens in H
    linears: Annotated[tuple[Linear, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Sensitivity:
        if len({linear.name for linear in self.linears}) < len(self.linears):
            raise ValueError("a linear is named twice")
        return self


def read_sensitivity(text: str | bytes, where: str) -> Sensitivity:
    """The record in the JSON `text`; a ToolError naming `where` if anything in it is amiss."""
    try:
        return Sensitivity.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ToolError(
            f"{where} is no sensitivity record: {place + ': ' if place else ''}{first['msg']}",
            "delete the artifact's folder and run the same command again",
        ) from error


@dataclass(frozen=True)
class Choice:
    """A scheme and how many input channels share a scale in it."""

    scheme: str
    group_size: int | Literal["channel"] | None = None

    @property
    def label(self) -> str:
        """`W4A16 g128`, `W8A16 channel`, `BF16`."""
        size = self.group_size
        if size is None:
            return self.scheme
        return f"{self.scheme} {size if size == 'channel' else f'g{size}'}"


BF16 = Choice("BF16")
"""Left as it is."""


@dataclass(frozen=True)
class Option:
    """One unit in one scheme: sums over its linears."""

    choice: Choice
    bytes: int
    error: float

    @property
    def order(self) -> tuple[int, float, str]:
        """Small before large, then good before bad; no two options of a unit are equal in it."""
        return (self.bytes, self.error, self.choice.label)


@dataclass(frozen=True)
class Unit:
    """Linears that share a scheme, since a server computes them as one matrix."""

    name: str
    linears: tuple[str, ...]
    parameters: int
    options: tuple[Option, ...]  # in their order, never empty


def units(
    record: Sensitivity, schemes: Collection[str], left_alone: Callable[[str], bool]
) -> tuple[Unit, ...]:
    """Units of the record, by layer, with the options that are among `schemes` for all linears.

    `left_alone` says of a module's name that the recipe keeps it in BF16 whatever comes: such
    linears are no part of the problem. A UsageError if nothing is left of the record or of a unit.
    """
    members: dict[str, list[Linear]] = defaultdict(list)
    for linear in sorted(record.linears, key=lambda one: (one.layer, one.unit, one.name)):
        if not left_alone(linear.name):
            members[linear.unit].append(linear)
    if not members:
        raise UsageError("the recipe ignores every linear", "shorten quantize.ignore")
    return tuple(_unit(name, linears, schemes) for name, linears in members.items())


def _unit(name: str, linears: Sequence[Linear], schemes: Collection[str]) -> Unit:
    per_linear = [{c.choice: c for c in linear.candidates} for linear in linears]
    shared = [choice for choice in per_linear[0] if all(choice in each for each in per_linear)]
    options = [
        Option(
            choice,
            sum(each[choice].bytes for each in per_linear),
            math.fsum(each[choice].error for each in per_linear),
        )
        for choice in shared
        if choice.scheme in schemes
    ]
    if not options:
        known = ", ".join(dict.fromkeys(choice.scheme for choice in shared))
        raise UsageError(
            f"none of the schemes {', '.join(schemes)} was measured for {name}",
            f"measured there: {known}",
        )
    return Unit(
        name,
        tuple(linear.name for linear in linears),
        sum(linear.parameters for linear in linears),
        tuple(sorted(options, key=lambda option: option.order)),
    )
