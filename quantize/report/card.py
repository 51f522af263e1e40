"""The model card: a function of one record, so that it cannot contradict its own tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import yaml

from quantize.engines import ENGINES
from quantize.errors import SourceError
from quantize.report.card_commands import (
    loaded_with,
    sglang_caution,
    sglang_command,
    transformers_code,
    verify_command,
    vllm_command,
)
from quantize.report.card_gguf import gguf_card
from quantize.report.card_metadata import eval_results, front_matter_values
from quantize.report.card_plots import alt_text
from quantize.report.card_serving import memory, parallel_sizes
from quantize.report.card_template import card_template
from quantize.report.markdown import Safe, clip
from quantize.report.redact import redact
from quantize.report.results import (
    Record,
    health_rows,
    method_text,
    model_verdict,
    noise_text,
    quality_rows,
    recovery_text,
    retention_rows,
    serving_rows,
    size_rows,
    smoke_row,
    verdict_rows,
)

__all__ = ["differences", "eval_results", "front_matter_values", "render_card"]

PLOTS = "quantize/plots"
"""Where a published repository has the card's pictures."""

DIFFERENCES = 5
"""Lines that :func:`differences` names."""

ANSWERS = 6
"""Smoke prompts that the card shows; the record has all."""

KEPT = 8
"""Modules left as they were that the card names; the record has all."""


def render_card(record: Record, template: str | None = None, name: str = "card.md.j2") -> str:
    """README.md for a card record (:mod:`quantize.stages.card`).

    `template` is the text of a template of the user's own, `name` what errors call it; else it is
    the shipped one. What a user's template does wrong is a SourceError with its line, and so is a
    record that lacks what a card needs.
    """
    render = card_template(template, name)
    try:
        variables = card_variables(redact(record))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise SourceError(
            f"the record is not that of a card: {type(error).__name__}: {error}",
            "make it again with `quantize run`",
        ) from error
    return render(variables)


def differences(readme: str, record: Record, template: str | None = None) -> list[str]:
    """What of a card's text its record does not say: the first lines that differ, in words.

    Empty where the card is what this program makes of the record (and of `template`, the text of
    `quantize/card.md.j2`, where the card has a template of its own). Raises what `render_card`
    raises for a record that is incomplete.
    """
    expected = render_card(record, template)
    if readme == expected:
        return []
    found = [
        f"line {number}: {_quoted(shown)}, by the record {_quoted(said)}"
        for number, (shown, said) in enumerate(
            zip_longest(readme.split("\n"), expected.split("\n")), 1
        )
        if shown != said
    ]
    more = [f"and {len(found) - DIFFERENCES} more lines"] if len(found) > DIFFERENCES else []
    return found[:DIFFERENCES] + more


def _quoted(line: str | None) -> str:
    return "no such line" if line is None else repr(clip(line, 160))


def card_variables(record: Record) -> dict[str, Any]:
    """Everything that a template may print; docs/reading-a-card.md lists the names."""
    compare = record.get("compare")
    return {
        "record": record,
        "front": front_matter_values(record),
        "method": method_text(record),
        "size_rows": size_rows(record),
        "memory": memory(record),
        "parallel_sizes": parallel_sizes(record),
        "quality_rows": quality_rows(compare) if compare else [],
        "recovery": recovery_text(compare) if compare else "",
        "plots": _plots(record),
        "serving_rows": serving_rows(record),
        "smoke": smoke_row(record),
        "answers": _answers(record),
        "verdict_rows": verdict_rows(compare) if compare else [],
        "verdict": model_verdict(compare) if compare else None,
        "retention_rows": retention_rows(compare) if compare else [],
        "health_rows": health_rows(compare) if compare else [],
        "noise": noise_text(compare) if compare else "",
        "gguf": gguf_card(record),
        "vllm": vllm_command(record),
        "sglang": sglang_command(record),
        "sglang_caution": sglang_caution(record),
        "transformers_code": transformers_code(record),
        "loaded_with": loaded_with(record),
        "verify_command": verify_command(record),
        "recipe_yaml": yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        "engine": _engine(record),
        "calibration": _calibration(record),
        "versions": _versions(record),
        "audit": _audit(record),
        **_perplexity(record),
    }


def _perplexity(record: Record) -> dict[str, Any]:
    """Parts of the first sentence; an absent measurement is None."""
    size = record["size"]
    perplexity = record.get("compare", {}).get("perplexity")
    return {
        "size_ratio": Safe(f"{size['candidate_bytes'] / size['baseline_bytes']:.3f}"),
        "ratio": perplexity and Safe(f"{perplexity['ratio']:.4f}"),
        "ratio_low": perplexity and Safe(f"{perplexity['ratio_low']:.4f}"),
        "ratio_high": perplexity and Safe(f"{perplexity['ratio_high']:.4f}"),
        "text": record["baseline"]["perplexity"]["text"] if perplexity else "",
    }


def _plots(record: Record) -> list[dict[str, str]]:
    """Place and description of each picture that the stage drew."""
    return [
        {"place": f"{PLOTS}/{name}.png", "alt": alt_text(name, record["compare"])}
        for name in record["plots"]
    ]


def _answers(record: Record) -> list[dict[str, str]]:
    """Smoke prompts that both sides answered; one of several copies."""
    if "compare" not in record:
        return []
    after = {smoke["name"]: smoke for smoke in record["candidate"]["smoke"]}
    shown: dict[str, dict[str, str]] = {}
    for smoke in record["baseline"]["smoke"]:
        if smoke["name"] in after:
            answer = after[smoke["name"]]["answer"]
            row = {"prompt": smoke["prompt"], "before": smoke["answer"], "after": answer}
            shown.setdefault(smoke["prompt"], row)
    return list(shown.values())[:ANSWERS]


def _engine(record: Record) -> str:
    """Who quantized, in words; a note on it where the recipe asked for another."""
    made = record["compress"]
    name = made.get("engine", "stream")  # records did not always say it
    words = made.get("engine_note") or (ENGINES[name].SAID if name in ENGINES else name)
    return f"{words} (its config says: {made['made_by']})" if "made_by" in made else str(words)


def _calibration(record: Record) -> list[tuple[str, str]]:
    """Label and value of what is known of the calibration data."""
    data = record.get("calibration")
    if data is None:
        return []
    found = [
        ("Data", str(data["source"])),
        ("Rows", f"{data['rows_used']:,} of {data['rows']:,}"),
        ("Sequences", f"{data['sequences']:,} of at most {data['sequence_length']:,} tokens"),
        ("Tokens", f"{data['tokens']:,}"),
        ("Chat template applied", "yes" if data["chat_template_applied"] else "no"),
        ("Seed", str(data["seed"])),
    ]
    digest = data["data_digest"]  # sha256 of a file, or repository@commit
    found.append(("Revision" if "@" in digest else "sha256", digest))
    return [*found, ("sha256 of the token ids' file", data["tokens_sha256"])]


def _versions(record: Record) -> dict[str, str]:
    """Every tool and its version, over all stages."""
    versions: Mapping[str, Mapping[str, str]] = record["versions"]
    merged = {name: version for stage in versions.values() for name, version in stage.items()}
    return {"quantize": record["quantize"], **dict(sorted(merged.items()))}


def _audit(record: Record) -> dict[str, Any]:
    audit = record["audit"]
    return {
        "checks": len(audit["checks"]),
        "passed": sum(check["passed"] for check in audit["checks"]),
        "quantized": audit["quantized_modules"],
        "kept": len(audit["kept_modules"]),
        "kept_names": audit["kept_modules"][:KEPT],
    }
