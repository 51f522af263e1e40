"""The model card: a function of one record, so that it cannot contradict its own tables."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from quantize.report.markdown import Safe, environment
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
from quantize.servers import vllm_lora

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")

TAGS = ("compressed-tensors", "vllm", "quantized")

ANSWERS = 6
"""Smoke prompts that the card shows; the record has all."""


def render_card(record: Record) -> str:
    """README.md for a card record (:mod:`quantize.stages.card`)."""
    record = redact(record)
    template = environment().get_template("card.md.j2")
    card: str = template.render(
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
    if "adapter" not in record:
        return " \\\n  ".join([f"vllm serve {shlex.quote(_place(record))}", *options])
    # vLLM takes an adapter from a folder, not from a folder of a repository.
    place = f"./{record['recipe']['name']}"
    options += adapter_options(record, place)
    get = f"hf download {record['target']} --local-dir {place}\n" if "target" in record else ""
    return get + " \\\n  ".join([f"vllm serve {shlex.quote(place)}", *options])


def adapter_options(record: Record, place: str) -> list[str]:
    """VLLM's flags for an adapter in `place`/adapter; requests name it as their model."""
    adapter, name = record["adapter"], record["recipe"]["name"]
    served = vllm_lora.adapter_options(
        f"{name}-adapter", f"{place}/adapter", adapter["rank"], adapter["targets"]
    )
    options = [shlex.join(words) for words in served]
    if record["adapter"]["tokenizer"]:
        options.append(f"--tokenizer {shlex.quote(f'{place}/adapter')}")
    return options


def transformers_code(record: Record) -> str:
    """A snippet that loads the checkpoint in transformers."""
    place = json.dumps(_place(record))
    if "adapter" in record:
        return _pair_code(record)
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
            f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")',
        )
    )


def _pair_code(record: Record) -> str:
    """The same for a base and its adapter, from a local copy."""
    place = f"./{record['recipe']['name']}"
    tokenizer = f"{place}/adapter" if record["adapter"]["tokenizer"] else place
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)})",
            f'base = AutoModelForCausalLM.from_pretrained({json.dumps(place)}, dtype="auto")',
            f"model = PeftModel.from_pretrained(base, {json.dumps(f'{place}/adapter')})",
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
