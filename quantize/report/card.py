"""The model card: a function of one record, so that it cannot contradict its own tables."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import yaml

from quantize.report.markdown import Safe, clip, environment
from quantize.report.redact import redact
from quantize.report.results import (
    HUB_ID,
    Record,
    health_rows,
    method_text,
    model_verdict,
    noise_text,
    quality_rows,
    retention_rows,
    serving_rows,
    size_rows,
    smoke_row,
    verdict_rows,
)

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")

TAGS = ("compressed-tensors", "vllm", "quantized")

DIFFERENCES = 5
"""Lines that :func:`differences` names."""

ANSWERS = 6
"""Smoke prompts that the card shows; the record has all."""


def render_card(record: Record, template: str | None = None) -> str:
    """README.md for a card record (:mod:`quantize.stages.card`).

    `template` is the text of a template of the user's own, instead of `card.md.j2`.
    """
    record = redact(record)
    templates = environment()
    shipped = templates.get_template("card.md.j2")
    chosen = shipped if template is None else templates.from_string(template)
    card: str = chosen.render(
        record=record,
        front=front_matter_values(record),
        method=method_text(record),
        size_rows=size_rows(record),
        quality_rows=quality_rows(record["compare"]) if "compare" in record else [],
        serving_rows=serving_rows(record),
        smoke=smoke_row(record),
        answers=_answers(record),
        verdict_rows=verdict_rows(record["compare"]) if "compare" in record else [],
        verdict=model_verdict(record["compare"]) if "compare" in record else None,
        retention_rows=retention_rows(record["compare"]) if "compare" in record else [],
        health_rows=health_rows(record["compare"]) if "compare" in record else [],
        noise=noise_text(record["compare"]) if "compare" in record else "",
        serve_command=serve_command(record),
        transformers_code=transformers_code(record),
        recipe_yaml=yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        calibration=_calibration(record),
        versions=_versions(record),
        audit=_audit(record),
        **_summary(record),
    )
    return card


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


def front_matter_values(record: Record) -> dict[str, Any]:
    """What the Hub reads; a value that the Hub would refuse is left out (the text has it still)."""
    source = record["source"]
    values: dict[str, Any] = {}
    bases = [name for name in record["base_models"] if HUB_ID.fullmatch(name)]
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
        values["base_model_relation"] = "quantized"
    if isinstance(source["license"], str) and _LICENSE.fullmatch(source["license"]):
        values["license"] = source["license"]
    languages = [name for name in source["languages"] if _LANGUAGE.fullmatch(name)]
    if languages:
        values["language"] = languages
    quantize = record["recipe"]["quantize"]
    values |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*quantize["method"].split("+"), quantize["scheme"].lower(), *TAGS],
        "quantized_by": "quantize",
    }
    return values


def _summary(record: Record) -> dict[str, Any]:
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


def serve_command(record: Record) -> str:
    """`vllm serve` with the settings of the measurement that make sense elsewhere, quoted."""
    serve = record["recipe"]["serve"]
    options = ["--dtype bfloat16"]
    if "max_model_len" in serve:
        options.append(f"--max-model-len {serve['max_model_len']}")
    options.append(f"--max-num-seqs {serve['max_num_seqs']}")
    options.append(f"--gpu-memory-utilization {serve['gpu_memory_utilization']}")
    if serve["tensor_parallel_size"] > 1:
        options.append(f"--tensor-parallel-size {serve['tensor_parallel_size']}")
    caching = "enable-prefix-caching"
    options.append(f"--{caching}" if serve["enable_prefix_caching"] else f"--no-{caching}")
    if serve["extra_args"]:
        options.append(shlex.join(serve["extra_args"]))
    return " \\\n  ".join([f"vllm serve {shlex.quote(_place(record))}", *options])


def transformers_code(record: Record) -> str:
    """A snippet that loads the checkpoint in transformers."""
    place = json.dumps(_place(record))
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
            f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")',
        )
    )


def _place(record: Record) -> str:
    """The repository that it is published in, or a folder."""
    return record.get("target") or f"./{record['recipe']['name']}"


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


def _audit(record: Record) -> dict[str, int]:
    audit = record["audit"]
    return {
        "checks": len(audit["checks"]),
        "passed": sum(check["passed"] for check in audit["checks"]),
        "quantized": audit["quantized_modules"],
        "kept": len(audit["kept_modules"]),
    }
