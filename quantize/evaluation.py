"""The recipe's block `evaluate`: suite, margins, and what the gate asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from quantize.block import Block, Fraction


def _number_or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One sentence instead of two errors, for a limit that may be lifted."""
    try:
        return handler(value)
    except ValidationError as error:
        numbers = [e for e in error.errors() if e["type"] not in ("literal_error", "float_type")]
        if isinstance(value, int | float) and not isinstance(value, bool) and numbers:
            limit = numbers[0]["msg"].removeprefix("Input should be ")
            raise ValueError(f"expected a number {limit}, or none; got {value:g}") from None
        raise ValueError("expected a number, or none for no limit") from None


Unlimited = Literal["none"]
Recovery = Annotated[Fraction | Unlimited, WrapValidator(_number_or_none)]
Ratio = Annotated[Annotated[float, Field(gt=1)] | Unlimited, WrapValidator(_number_or_none)]


DEFAULT_RECOVERY = {4: 0.97, 8: 0.99}
DEFAULT_PERPLEXITY_RATIO = {4: 1.05, 8: 1.01}
"""Margins where the recipe names none, by :attr:`quantize.recipe.Quantize.weight_bits`."""


class TaskMargin(Block):
    """How much worse one task's score may be: one of the two."""

    recovery: Recovery | None = Field(
        None, description="Lowest share of the baseline's score that must be left, or none."
    )
    drop: Fraction | None = Field(
        None, description="Largest drop of the score, in the metric's own unit, e.g. 0.02."
    )

    @model_validator(mode="after")
    def _is_one(self) -> TaskMargin:
        if (self.recovery is None) == (self.drop is None):
            raise ValueError("give either recovery or drop")
        return self


class Margins(Block):
    """How much worse the candidate may be. What is left out has a default by the scheme.

    A verdict compares an interval with its margin: non-inferior where the whole 95% interval is
    inside, inferior where it is outside, else inconclusive.
    """

    perplexity_ratio: Ratio | None = Field(
        None,
        description="Highest candidate/baseline perplexity, or none. Default: 1.05 with 4-bit "
        "weights, 1.01 with 8-bit ones.",
    )
    recovery: Recovery | None = Field(
        None,
        description="Lowest share of a task's baseline score that must be left, or none. Default: "
        "0.97 with 4-bit weights, 0.99 with 8-bit ones.",
    )
    task_drop: Fraction | None = Field(
        None, description="Instead of recovery: largest drop of a task's score, absolute."
    )
    tasks: dict[str, TaskMargin] = Field(
        default_factory=dict, description="Margins of single tasks, by name."
    )

    @model_validator(mode="after")
    def _one_rule_for_tasks(self) -> Margins:
        if self.recovery is not None and self.task_drop is not None:
            raise ValueError("give either recovery or task_drop; single tasks go under tasks")
        return self


class GateRules(Block):
    """What ends a run with exit code 7, and publishes nothing."""

    tasks: tuple[str, ...] | None = Field(
        None, description="Tasks that count, all of them if absent; others are only reported."
    )
    every_task: bool = Field(
        False, description="Ask each task for non-inferiority, not their average alone."
    )
    inconclusive: Literal["fail", "pass"] = Field(
        "fail", description="What becomes of a verdict that the suite is too small for."
    )


class OwnText(Block):
    """Held-out text of the user's own, measured beside the suite's."""

    text: str = Field(
        min_length=1,
        description="A .jsonl file with `text` rows or a .txt file, or a Hub data set.",
    )
    revision: str | None = Field(None, description="Hub only: a commit hash.")
    config: str | None = Field(None, description="Hub only: the data set's configuration.")
    split: str = Field("test", description="Hub only: the split.")
    field: str = Field("text", description="The column (or JSON key) that holds the text.")


class Evaluate(Block):
    """What is measured, on both sides, through the server."""

    suite: str = Field(
        min_length=1, description="A name in eval/suites, or a path to a suite file."
    )
    text: OwnText | None = Field(
        None, description="Own held-out text, cut as the suite's perplexity block says."
    )
    quick: bool = Field(
        False, description="Measure the suite's quick subset: minutes, and wider intervals."
    )
    noise: bool = Field(
        True, description="Measure the baseline a second time: the server's own nondeterminism."
    )
    retention: bool = Field(
        True, description="Measure model.base too, where it is given: what is left of the gain."
    )
    margins: Margins = Field(default_factory=Margins, description="How much worse is allowed.")
    gate: GateRules = Field(default_factory=GateRules, description="What fails the run.")
