"""The gate: verdicts and smoke answers as conditions, each with a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.evaluation import GateRules
from quantize.records import Gate, SmokeDelta, Verdict
from quantize.report.paired.pairing import SAME_QUESTIONS

HELP_INFERIOR = (
    "more bits for the sensitive modules (`quantize search`), another method or scheme, or "
    "calibration data more like the evaluation's would help"
)


def gates(verdicts: Sequence[Verdict], rules: GateRules, smoke: Sequence[SmokeDelta]) -> list[Gate]:
    """A gate for each verdict that counts (not the model's, which follows from them), and smoke.

    Inferior and not comparable fail. Inconclusive fails unless the recipe lets it pass; of a single
    task it fails only where every task is asked, because otherwise the average decides.
    """
    found = []
    for verdict in verdicts:
        if verdict["counts"] and verdict["name"] != "model":
            found.append(_gate(verdict, rules))
    return found + _answered(smoke)


def _gate(verdict: Verdict, rules: GateRules) -> Gate:
    says, name = _found(verdict), verdict["verdict"]
    passed = name == "non-inferior"
    if name == "inferior":
        says += f" (p = {verdict['adjusted_p']:.2g} after Holm's correction); {HELP_INFERIOR}"
    elif name == "not comparable":
        says += f"; {SAME_QUESTIONS}"
    elif name == "inconclusive":
        single = verdict["name"].startswith("task:") and not rules.every_task
        passed = single or rules.inconclusive == "pass"
        says += f"; {_would_decide(verdict)}"
        says += " (the tasks' average decides)" if single else ""
        if not passed:
            says += ", or let it pass with evaluate.gate.inconclusive: pass"
    return Gate(name=verdict["name"], passed=passed, says=says)


def _found(verdict: Verdict) -> str:
    name = _subject(verdict["name"])
    if "worse" not in verdict:
        return f"{name} is {verdict['verdict']}: {verdict.get('reason', 'no estimate')}"
    percent = verdict["name"].endswith("perplexity")

    def figure(value: float) -> str:
        return f"{100 * value:.3g}%" if percent else f"{value:.3g}"

    worse = verdict["worse"]
    how = "no worse" if worse == 0 else f"{figure(abs(worse))} {'worse' if worse > 0 else 'better'}"
    return (
        f"{name} is {how} (95% interval of the loss: {figure(verdict['low'])} to "
        f"{figure(verdict['high'])}), the margin is {figure(verdict['margin'])} "
        f"({verdict['rule']}): {verdict['verdict']}"
    )


def _subject(name: str) -> str:
    if name.startswith("task:"):
        return f"task {name.removeprefix('task:')}"
    return {
        "perplexity": "perplexity",
        "own_perplexity": "perplexity of the own text",
        "tasks": "the tasks' average",
    }[name]


def _would_decide(verdict: Verdict) -> str:
    if "more_documents" in verdict:
        more = verdict["more_documents"]
        return f"about {more} more document{'' if more == 1 else 's'} would decide"
    return verdict["reason"] + "; set another margin"


def _answered(smoke: Sequence[SmokeDelta]) -> list[Gate]:
    """A gate that is always there: no prompt that the baseline answers stays without answer."""
    if not smoke:
        return []
    silent = [answer["name"] for answer in smoke if not answer["answered"]]
    says = "every smoke prompt that the baseline answers is answered"
    if silent:
        says = (
            f"{len(silent)} of {len(smoke)} smoke prompts that the baseline answers stay without "
            f"an answer (the limit is 0): {', '.join(silent)}; look at the server's log and at "
            "the end-of-text token and chat template of the artifact"
        )
    return [Gate(name="smoke_unanswered", passed=not silent, says=says)]
