"""Which of a suite's parts a measurement asks for: by stage, and by the recipe's `quick`."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.evaluation import OwnText
from quantize.stages.base import Resolved
from quantize.suite import PerplexityText, Suite


@dataclass(frozen=True)
class Scope:
    """What one measure stage asks of its server."""

    suite: Suite  # cut down to its quick subset where the recipe says so
    own_text: PerplexityText | None
    quick: bool
    everything: bool  # smoke prompts, generation health and the load too
    texts: bool  # held-out text
    again: bool  # the baseline a second time, for the server's own noise
    foreign_tokenizer: bool  # the served model is not the one that the tokenizer belongs to

    @property
    def perplexity(self) -> PerplexityText | None:
        """The suite's held-out text, if it is asked for."""
        return self.suite.perplexity if self.texts else None

    @property
    def health_prompts(self) -> int | None:
        """How many prompts of generation health at most; None for all of them."""
        return self.suite.quick.health_prompts if self.quick else None


def scope(resolved: Resolved, entry_id: str) -> Scope:
    """What the stage `entry_id` measures.

    measure-baseline and measure-candidate measure everything; measure-repeat held-out text and
    tasks, with a server started again; measure-base tasks alone, with the fine-tune's tokenizer.
    """
    suite, evaluate = resolved.suite, resolved.recipe.evaluate
    assert suite is not None, "the planner adds this stage only for a suite"
    assert evaluate is not None, "a suite comes from an evaluate block"
    base = entry_id == "measure-base"
    again = entry_id == "measure-repeat"
    own = evaluate.text
    return Scope(
        suite=quick_subset(suite) if evaluate.quick else suite,
        own_text=None if own is None or base else own_text(own, suite, evaluate.quick),
        quick=evaluate.quick,
        everything=not base and not again,
        texts=not base,
        again=again,
        foreign_tokenizer=base,
    )


def quick_subset(suite: Suite) -> Suite:
    """The suite with the limits of its `quick` block, where they are lower than its own."""
    quick, text = suite.quick, suite.perplexity
    if text is not None:
        text = text.model_copy(update={"windows": _lower(text.windows, quick.windows)})
    tasks = tuple(
        task.model_copy(update={"limit": _lower(task.limit, quick.documents)})
        for task in suite.tasks
    )
    return suite.model_copy(update={"perplexity": text, "tasks": tasks})


def own_text(text: OwnText, suite: Suite, quick: bool) -> PerplexityText:
    """The user's own text, cut with the suite's window, stride and top k, each row by itself."""
    values = text.model_dump() | {"windows": suite.quick.windows if quick else None}
    if suite.perplexity is not None:
        values |= suite.perplexity.model_dump(include={"window", "stride", "top_k"})
    return PerplexityText(**values)


def _lower(limit: int | None, quick: int) -> int:
    return quick if limit is None else min(limit, quick)
