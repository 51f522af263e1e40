"""A complete card record and its details, as a run of two tasks leaves them; with hostile strings.

The figures are those of a 4-bit checkpoint of six million parameters, made by formulas and a seed;
they agree with each other where the page shows both (a difference and its two scores).
"""

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

from quantize.protocol import write_json

XSS = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
BREAKOUT = "</pre></style></script><svg onload=\"document.title='owned'\">{{ 7 * 7 }}"

COMPARE_KEY = "d" * 64


def measure(side: str) -> dict[str, Any]:
    candidate = side == "candidate"
    score = {"valley_mc": 0.84 if candidate else 0.845, "valley_qa": 0.72 if candidate else 0.74}
    nats = 17968.14 if candidate else 17753.26
    text = {
        "text_sha256": "9b44" * 16,
        "tokens_sha256": "be3a" * 16,
        "windows": 230,
        "window": 512,
        "stride": 511,
        "joined": False,
        "bos": True,
        "excluded": "the first token of each window, which is context only",
        "top_k": 20,
    }
    return {
        "schema": "quantize.measure/2",
        "subject": subject(side),
        "suite": "tiny",
        "quick": False,
        "concurrency": 16,
        "server": {
            "name": "vllm",
            "version": "0.32.0",
            "command": ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "MODEL"],
            "accelerator": "cpu",
            "device": "AMD EPYC, 2 cores",
            "start_seconds": 38.99 if candidate else 36.57,
        },
        "smoke": [
            smoke(
                "continue",
                "The roofs of Brackwater are",
                " purple slate." if candidate else " purple.",
            ),
            smoke("hostile", XSS, XSS),
        ],
        "perplexity": {
            **text,
            "text": "valley.jsonl",
            "documents": 230,
            "scored_tokens": 23191,
            "total_nats": nats,
            "perplexity": math.exp(nats / 23191),
        },
        "own_perplexity": {
            **text,
            "text": "letters.jsonl",
            "documents": 48,
            "scored_tokens": 6104,
            "total_nats": 5211.5,
            "perplexity": math.exp(5211.5 / 6104),
        },
        "tasks": [
            {
                "name": name,
                "version": "1.0",
                "metric": "acc" if name == "valley_mc" else "exact_match",
                "higher_is_better": True,
                "score": value,
                "standard_error": math.sqrt(value * (1 - value) / documents),
                "documents": documents,
                "num_fewshot": 0,
                "chat_template": True,
                "prompts_sha256": "521c" * 16,
                "repeats": 1,
            }
            for (name, value), documents in zip(score.items(), (400, 150), strict=True)
        ],
        "health": {
            "prompts": 32,
            "prompts_sha256": "77aa" * 16,
            "max_tokens": 256,
            "repeating": 0.09375 if candidate else 0.0625,
            "ended_early": 0.0,
            "cut_off": 0.125 if candidate else 0.09375,
            "invalid_utf8": 0.0,
            "template_echo": 0.0,
            "schema_prompts": 8,
            "schema_valid": 0.75 if candidate else 0.875,
            "tokens_median": 41.0 if candidate else 39.0,
            "tokens_p10": 11.0,
            "tokens_p90": 203.0 if candidate else 188.0,
        },
        "serving": {
            "requests": 16,
            "concurrency": 4,
            "input_tokens": 64,
            "output_tokens": 32,
            "time_to_first_token_ms_median": 18.99 if candidate else 15.95,
            "time_to_first_token_ms_p99": 26.37 if candidate else 28.17,
            "time_per_output_token_ms_median": 2.588 if candidate else 2.776,
            "output_tokens_per_second": 1278.6 if candidate else 1226.4,
            "requests_per_second": 39.96 if candidate else 38.32,
            "kv_cache_tokens": 524_288,
            "prometheus": {"vllm:num_preemptions_total": 0.0},
        },
        "not_measured": [],
        "versions": {"lm-eval": "0.4.13", "vllm": "0.32.0"},
        "seconds": {"server start": 38.99, "smoke": 0.24, "perplexity": 7.78, "load": 11.78},
    }


def subject(side: str) -> dict[str, Any]:
    return {
        "key": ("caa0" if side == "candidate" else "5d7c") * 16,
        "bytes": 3_749_832 if side == "candidate" else 8_397_400,
        "parameters": 4_196_608,
    }


def smoke(name: str, prompt: str, answer: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "completion",
        "prompt": prompt,
        "answer": answer,
        "finish_reason": "stop",
        "completion_tokens": 6,
        "seconds": 0.06,
        "checks": [{"name": "not_empty", "passed": True, "detail": ""}],
    }


def perplexity_delta(
    baseline: float, ratio: float, low: float, high: float, tokens: int, documents: int
):
    return {
        "baseline": baseline,
        "candidate": baseline * ratio,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "scored_tokens": tokens,
        "documents": documents,
        "inside_noise": False,
    }


def divergence(mean: float, tokens: int) -> dict[str, Any]:
    percentiles = ("0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9")
    values = (
        -0.412,
        -0.131,
        -0.0332,
        -0.0121,
        -0.00113,
        -1.9e-7,
        0.00087,
        0.0107,
        0.0301,
        0.124,
        0.387,
    )
    return {
        "top_k": 20,
        "tokens": tokens,
        "mean": mean,
        "mean_low": 0.93 * mean,
        "mean_high": 1.08 * mean,
        "median": 0.0003968,
        "p99": 0.09635,
        "p999": 0.47487,
        "maximum": 3.1809,
        "top1_agreement": 0.96464,
        "delta_p_mean": -0.000731,
        "delta_p_rms": 0.03127,
        "delta_p_percentiles": dict(zip(percentiles, values, strict=True)),
    }


def task_delta(
    name: str, metric: str, before: float, after: float, documents: int, lost: int, gained: int
):
    difference = after - before
    error = math.sqrt(lost + gained + 2) / documents
    return {
        "name": name,
        "metric": metric,
        "higher_is_better": True,
        "baseline": before,
        "candidate": after,
        "difference": difference,
        "difference_low": difference - 1.96 * error,
        "difference_high": difference + 1.96 * error,
        "standard_error": error,
        "documents": documents,
        "lost": lost,
        "gained": gained,
        "mcnemar_p": 0.2668 if lost > gained else 1.0,
        "recovery": after / before,
        "recovery_low": (after - 1.96 * error) / before,
        "recovery_high": (after + 1.96 * error) / before,
        "detectable": 2.8 * error,
        "inside_noise": lost == gained,
    }


def verdict(
    name: str, said: str, figures: tuple[float, float, float, float], rule: str, **more: Any
):
    worse, low, high, margin = figures
    return {
        "name": name,
        "verdict": said,
        "worse": worse,
        "low": low,
        "high": high,
        "margin": margin,
        "rule": rule,
        "counts": True,
        "adjusted_p": 1.0,
        **more,
    }


def compare() -> dict[str, Any]:
    mc = task_delta("valley_mc", "acc", 0.845, 0.84, 400, 5, 3)
    qa = task_delta("valley_qa", "exact_match", 0.74, 0.72, 150, 6, 3)
    return {
        "schema": "quantize.compare/2",
        "baseline": subject("baseline"),
        "candidate": subject("candidate"),
        "size_ratio": 3_749_832 / 8_397_400,
        "perplexity": perplexity_delta(2.1501205, 1.0093085, 1.0075639, 1.0111637, 23191, 230),
        "divergence": divergence(0.0064459, 23191),
        "own_perplexity": perplexity_delta(2.3487, 1.0131, 1.0052, 1.0214, 6104, 48),
        "own_divergence": divergence(0.0071, 6104),
        "tasks": [mc, qa],
        "aggregate": {
            "tasks": 2,
            "documents": 550,
            "worse": 0.0125,
            "low": -0.0082,
            "high": 0.0332,
            "recovery": 0.98353,
            "pooled_p": 0.1662,
            "fisher_p": 0.3174,
            "max_p": 0.4409,
        },
        "retention": [
            {
                "name": "valley_mc",
                "metric": "acc",
                "base": 0.31,
                "fine_tuned": 0.845,
                "candidate": 0.84,
                "gain": 0.535,
                "gain_low": 0.4812,
                "gain_high": 0.5888,
                "retained": 0.99065,
                "retained_low": 0.96442,
                "retained_high": 1.01703,
            },
            {
                "name": "valley_qa",
                "metric": "exact_match",
                "base": 0.733,
                "fine_tuned": 0.74,
                "candidate": 0.72,
                "gain": 0.007,
                "gain_low": -0.0413,
                "gain_high": 0.0553,
                "reason": "the fine-tune gained nothing here that can be told from chance",
            },
        ],
        "noise": {
            "perplexity_ratio": 1.000021,
            "tokens_changed": 0.1873,
            "kl_mean": 3.1e-7,
            "top1_agreement": 0.99987,
            "tasks": [
                {"name": "valley_mc", "difference": 0.0, "flips": 0, "documents": 400},
                {"name": "valley_qa", "difference": -0.00667, "flips": 1, "documents": 150},
            ],
        },
        "lint": {
            "rows": 128,
            "overlapping_rows": 3,
            "ngram": 13,
            "tokens_median": 61.0,
            "evaluation_tokens_median": 104.0,
            "languages": {"en": 0.984, "de": 0.016},
            "evaluation_languages": {"en": 1.0},
            "chat_template_applied": True,
            "evaluation_chat_template": True,
            "padding_share": 0.0,
            "findings": [
                {
                    "kind": "overlap",
                    "message": "3 calibration rows share 13 words in a row with an evaluation "
                    "document: they are no held-out evidence",
                    "rows": [17, 92, 118],
                }
            ],
        },
        "health": [
            {
                "name": name,
                "baseline": before,
                "candidate": after,
                "got_worse": worse,
                "got_better": better,
                "mcnemar_p": p,
                "alarm": alarm,
            }
            for name, before, after, worse, better, p, alarm in (
                ("repeating", 0.0625, 0.09375, 1, 0, 1.0, False),
                ("ended_early", 0.0, 0.0, 0, 0, 1.0, False),
                ("cut_off", 0.09375, 0.125, 2, 1, 1.0, False),
                ("schema_valid", 0.875, 0.375, 7, 1, 0.0352, True),
            )
        ],
        "verdicts": [
            verdict(
                "perplexity", "non-inferior", (0.0093085, 0.0075639, 0.0111637, 0.05), "ratio 1.05"
            ),
            verdict("own_perplexity", "non-inferior", (0.0131, 0.0052, 0.0214, 0.05), "ratio 1.05"),
            verdict(
                "task:valley_mc",
                "non-inferior",
                (0.005, -0.0105, 0.0205, 0.02535),
                "recovery 0.97 of 0.845",
            ),
            verdict(
                "task:valley_qa",
                "inconclusive",
                (0.02, -0.0233, 0.0633, 0.0222),
                "recovery 0.97 of 0.74",
                more_documents=57_900,
                counts=False,
            ),
            verdict(
                "tasks",
                "inconclusive",
                (0.0125, -0.0082, 0.0332, 0.0238),
                "mean of the tasks’ margins",
                more_documents=1_390,
            ),
            {
                "name": "model",
                "verdict": "inconclusive",
                "rule": "non-inferior in perplexity, own_perplexity, tasks",
                "counts": True,
                "reason": "inconclusive: tasks",
            },
        ],
        "gates": [
            {"name": "perplexity", "passed": True, "says": "0.931% worse, the margin is 5%"},
            {
                "name": "tasks",
                "passed": False,
                "says": "inconclusive; about 1390 more documents would decide",
            },
        ],
        "alarms": ["schema_valid fell from 87.5% to 37.5% of the prompts (p = 0.035)"],
        "quick": False,
        "smoke": [
            {"name": "continue", "similarity": 0.667, "identical": False, "answered": True},
            {"name": "hostile", "similarity": 1.0, "identical": True, "answered": True},
        ],
        "smoke_failed": [],
        "not_measured": [
            {"what": "task valley_long", "why": "its prompts are longer than max_model_len"}
        ],
    }


def card() -> dict[str, Any]:
    return copy.deepcopy(
        {
            "schema": "quantize.card/3",
            "quantize": "0.1.0",
            "recipe": {
                "version": 1,
                "name": "tiny-llama-awq",
                "model": {"source": "examples/tiny_llama/instruct", "license": "apache-2.0"},
                "quantize": {"method": "awq", "scheme": "W4A16_ASYM", "group_size": 128},
                "evaluate": {"suite": "tiny"},
                "serve": {"max_model_len": 1024, "note": BREAKOUT},
            },
            "source_name": "instruct",
            "fine_tuned_from": "base",
            "base_models": [],
            "source": {
                "kind": "folder",
                "architecture": "LlamaForCausalLM",
                "license": "apache-2.0",
            },
            "size": {
                "baseline_bytes": 8_397_400,
                "candidate_bytes": 3_749_832,
                "parameters": 4_196_608,
            },
            "compress": {
                "method": "awq",
                "scheme": "W4A16_ASYM",
                "engine": "stream",
                "seconds": 11.0,
            },
            "audit": {
                "checks": [{"name": "every tensor", "passed": True, "detail": ""}],
                "quantized_modules": 28,
                "kept_modules": ["lm_head"],
            },
            "calibration": {
                "source": "calibration.jsonl",
                "rows": 256,
                "rows_used": 128,
                "tokens": 8067,
            },
            "baseline": measure("baseline"),
            "candidate": measure("candidate"),
            "compare": compare(),
            "artifacts": {"compare": COMPARE_KEY},
            "versions": {
                "compress": {"torch": "2.13.0"},
                "candidate": {"vllm": "0.32.0"},
                "audit": {},
            },
        }
    )


def details() -> dict[str, Any]:
    generator = random.Random(0)
    starts = list(range(0, 512, 16))

    def series(level: float) -> dict[str, Any]:
        before = [
            level + 1.9 / math.sqrt(1 + start / 6) + generator.gauss(0, 0.025) for start in starts
        ]
        return {
            "starts": starts,
            "ends": [start + 16 for start in starts],
            "tokens": [3600 - 6 * start for start in starts],
            "baseline_nats": before,
            "candidate_nats": [value * 1.011 + generator.gauss(0, 0.004) for value in before],
            "kl": [
                0.0045 + 0.006 / (1 + start / 40) + abs(generator.gauss(0, 8e-4))
                for start in starts
            ],
        }

    def histogram(tokens: int) -> dict[str, Any]:
        edges = [round(-1 + 2 * n / 60, 6) for n in range(61)]
        middles = [-1.05, *[(a + b) / 2 for a, b in itertools.pairwise(edges)], 1.05]
        shares = [math.exp(-abs(x + 0.01) / 0.085) + 4e-4 for x in middles]
        return {"edges": edges, "counts": [int(tokens * s / sum(shares)) for s in shares]}

    return {
        "series": {"perplexity": series(0.55), "own_perplexity": series(0.66)},
        "delta_log_p": {"perplexity": histogram(23191), "own_perplexity": histogram(6104)},
        "flips": {"valley_mc": choices(), "valley_qa": answers()},
    }


def choices() -> list[dict[str, Any]]:
    asked = (
        "Where does the miller of Brackwater buy her salt?\nA. in Ivelstone\nB. at the weir\n"
        "C. from a pedlar\nD. nowhere\nAnswer:"
    )
    right = "  -8.320 in Ivelstone\n  -4.590 at the weir\n> -2.720 from a pedlar\n  -7.190 nowhere"
    wrong = "> -2.490 in Ivelstone\n  -3.090 at the weir\n  -2.590 from a pedlar\n  -6.370 nowhere"
    return [
        flip(
            f"mc-{n:03}",
            asked if n else XSS,
            "2",
            *((right, wrong) if n < 5 else (wrong, right)),
            1.0 if n < 5 else 0.0,
        )
        for n in range(8)
    ]


def answers() -> list[dict[str, Any]]:
    passage = (
        "Read this and answer the question.\n\nIt was Tuesday when Winifred packed two yellow "
        "stones and took the road from Ivelstone. Fog lay on the fields. For company "
        "Winifred had a pony. Near the weir the pony began to limp."
        "\n\nWhich animal went with Winifred?"
    )
    return [
        flip(
            f"qa-{n:03}",
            passage,
            "pony" if n else BREAKOUT,
            *(("pony", "hen") if n < 6 else ("hen", "pony")),
            1.0 if n < 6 else 0.0,
        )
        for n in range(9)
    ]


def flip(doc: str, prompt: str, target: str, baseline: str, candidate: str, before: float):
    return {
        "doc": doc,
        "prompt": prompt,
        "target": target,
        "baseline": baseline,
        "candidate": candidate,
        "baseline_score": before,
        "candidate_score": 1.0 - before,
    }


def write_store(
    root: Path, record: dict[str, Any], found: dict[str, Any] | None, key: str = "a" * 64
):
    """A card, and the comparison it was made from, at their places in a store."""
    folder = root / "card" / key
    folder.mkdir(parents=True)
    write_json(folder / "record.json", record)
    if found is not None:
        beside = root / "compare" / record["artifacts"]["compare"]
        beside.mkdir(parents=True, exist_ok=True)
        write_json(beside / "details.json", found)
    return folder / "record.json"


def worse_card() -> dict[str, Any]:
    """Another model of the same original: smaller, and found inferior."""
    record = card()
    record["recipe"]["name"] = "tiny-llama-rtn"
    record["recipe"]["quantize"] = {"method": "rtn", "scheme": "W4A16", "group_size": "channel"}
    record["size"]["candidate_bytes"] = 3_402_000
    found = record["compare"]
    found["perplexity"] |= {"ratio": 1.0812, "ratio_low": 1.0743, "ratio_high": 1.0888}
    found["aggregate"] |= {"worse": 0.071, "low": 0.044, "high": 0.098}
    for task in found["tasks"]:
        for end in ("candidate", "difference", "difference_low", "difference_high"):
            task[end] -= 0.06
    for item in found["verdicts"]:
        item["verdict"] = "inferior"
    record["candidate"]["serving"]["output_tokens_per_second"] = 1391.0
    return record


def better_card() -> dict[str, Any]:
    """A third one: larger, and non-inferior."""
    record = card()
    record["recipe"]["name"] = "tiny-llama-fp8"
    record["recipe"]["quantize"] = {"method": "fp8", "scheme": "FP8_DYNAMIC"}
    record["size"]["candidate_bytes"] = 5_271_000
    found = record["compare"]
    found["perplexity"] |= {"ratio": 1.0009, "ratio_low": 1.0001, "ratio_high": 1.0017}
    found["aggregate"] |= {"worse": -0.001, "low": -0.009, "high": 0.007}
    for item in found["verdicts"]:
        item["verdict"] = "non-inferior"
    record["candidate"]["serving"]["output_tokens_per_second"] = 1105.0
    return record
