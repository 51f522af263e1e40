"""What is odd about a comparison and fails no gate: sentences for people."""

from __future__ import annotations

from quantize.records import CompareRecord, Divergence

KL_NATS = 0.1
TOP1_AGREEMENT = 0.9


def alarms(record: CompareRecord) -> list[str]:
    """Divergence, generation health that got worse, and a quick run that is too small."""
    found = []
    for where, divergence in (
        ("", record.get("divergence")),
        (" on the own text", record.get("own_divergence")),
    ):
        if divergence is not None:
            found += _divergence(divergence, where)
    for rate in record["health"]:
        if rate["alarm"]:
            found.append(
                f"generation health: {rate['name']} went from {rate['baseline']:.1%} to "
                f"{rate['candidate']:.1%} of the prompts ({rate['got_worse']} got worse, "
                f"{rate['got_better']} better, p = {rate['mcnemar_p']:.2g})"
            )
    return found + (_too_small(record) if record["quick"] else [])


def _divergence(divergence: Divergence, where: str) -> list[str]:
    found = []
    if divergence["mean"] > KL_NATS:
        found.append(
            f"the mean KL divergence{where} is {divergence['mean']:.3g} nats a token, more than "
            f"{KL_NATS:g}: the candidate is another model in much of what it says"
        )
    if divergence["top1_agreement"] < TOP1_AGREEMENT:
        found.append(
            f"the most likely token{where} is the same at {divergence['top1_agreement']:.1%} of "
            f"the positions, less than {TOP1_AGREEMENT:.0%}"
        )
    return found


def _too_small(record: CompareRecord) -> list[str]:
    margins = {verdict["name"]: verdict.get("margin") for verdict in record["verdicts"]}
    found = []
    for task in record["tasks"]:
        margin = margins.get(f"task:{task['name']}")
        if margin is not None and task["detectable"] > margin:
            found.append(
                f"quick: this subset of {task['documents']} documents of {task['name']} cannot see "
                f"a loss below {task['detectable']:.3g}, and the margin is {margin:.3g}"
            )
    return found
