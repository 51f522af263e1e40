"""Calibration data held against what is evaluated: what a person should know before believing it.

Pure: rows, statistics and documents in, :class:`quantize.records.Lint` out. A finding is a warning
and never ends a run; it names rows by their number in the source and says what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

from quantize.records import Lint, LintFinding
from quantize.report.paired.overlap import NGRAM, Overlap, RowIndex, has_marker, without_markers

NAMED_ROWS = 10
"""So many rows are named in a finding."""
LANGUAGE_BYTES = 32
"""Shorter texts (UTF-8, without template markers) have no language that can be told."""
LANGUAGE_CONFIDENCE = 0.9
LANGUAGE_SHARE = 0.1
"""A language of a smaller share of texts is not spoken of: single texts are misjudged."""
LANGUAGE_TEXTS, LANGUAGE_CHARACTERS = 400, 1500
"""A profile needs no more than so many documents of a task and characters of a text."""
LENGTH_FACTOR = 4
"""Evaluation texts are called longer than calibration sequences if their median is so much so."""
EMPTY_SHARE = 0.8
"""Padding is spoken of from here: a fifth of the tokens that were asked for is there."""
TEMPLATED_SHARE = 0.1
"""Fewer calibration rows with the chat template are called none."""
UNKNOWN = "unknown"
NO_LANGUAGE = "zxx"  # ISO 639's code for what is none: figures, random letters


def lint(
    rows: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Any],
    documents: Mapping[str, Sequence[str]],
    evaluation_templated: bool,
    *,
    ngram: int = NGRAM,
) -> Lint:
    """Hold calibration `rows` (of `rows.jsonl`) against the evaluation's `documents` by task.

    `calibration` is `calibrate.json`; `evaluation_templated` says whether any task asks through the
    chat template. `padding_share` is the share of sequences × sequence_length that holds no token
    (0 for packed rows). `evaluation_tokens_median` is an estimate: the documents' characters times
    the rows' tokens per character. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("there are no calibration rows to look at")
    texts = [str(row["text"]) for row in rows]
    numbers = [int(row["row"]) for row in rows]
    tokens = [int(row["tokens"]) for row in rows]
    index = RowIndex(texts)
    overlaps = {name: index.overlaps(source, ngram) for name, source in documents.items()}
    languages = [language(text) for text in texts]
    evaluated = _profile(
        language(text) for source in documents.values() for text in _spread(source)
    )
    result: Lint = {
        "rows": len(rows),
        "overlapping_rows": len({found.row for group in overlaps.values() for found in group}),
        "ngram": ngram,
        "tokens_median": float(median(tokens)),
        "languages": _profile(languages),
        "evaluation_languages": evaluated,
        "chat_template_applied": bool(calibration["chat_template_applied"]),
        "evaluation_chat_template": evaluation_templated,
        "padding_share": _padding(calibration),
        "findings": [],
    }
    lengths = [len(text) for source in documents.values() for text in source]
    if lengths:
        per_character = sum(tokens) / max(sum(map(len, texts)), 1)
        result["evaluation_tokens_median"] = float(median(lengths)) * per_character
    result["findings"] = [
        *(_overlap(name, group, numbers) for name, group in overlaps.items() if group),
        *_lengths(result, calibration, numbers, tokens),
        *_languages(result, languages, numbers),
        *_template(result, calibration, texts, numbers),
        *_empty(result, calibration, numbers, tokens),
    ]
    return result


def language(text: str) -> str:
    """ISO 639 code of the text's language, or "unknown" where one cannot be sure of it."""
    bare = without_markers(text[:LANGUAGE_CHARACTERS])
    if len(bare.encode()) < LANGUAGE_BYTES:
        return UNKNOWN
    code, confidence = _identifier().classify(bare)
    sure = confidence >= LANGUAGE_CONFIDENCE and code != NO_LANGUAGE
    return str(code) if sure else UNKNOWN


@cache
def _identifier() -> Any:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _profile(codes: Iterable[str]) -> dict[str, float]:
    """Share of each language, the most frequent first; empty for no texts."""
    counts = Counter(codes)
    return {code: count / counts.total() for code, count in counts.most_common()}


def _spread(source: Sequence[str]) -> Sequence[str]:
    """At most `LANGUAGE_TEXTS` documents, evenly over the whole."""
    return source[:: -(-len(source) // LANGUAGE_TEXTS) or 1]


def _padding(calibration: Mapping[str, Any]) -> float:
    if calibration["packing"]:
        return 0.0
    room = calibration["sequences"] * calibration["sequence_length"]
    return 1.0 - float(calibration["tokens"] / room)


def _overlap(name: str, group: Sequence[Overlap], numbers: Sequence[int]) -> LintFinding:
    most = max(group, key=lambda found: found.shared)
    return LintFinding(
        kind="overlap",
        message=f"{_rows(len(group))} in the calibration data with text of {name} (row "
        f"{numbers[most.row]} shares {most.shared} words of it: “{most.phrase}”): a score on text "
        "that the calibration has seen flatters the quantized model; take such rows out, or "
        "calibrate on other data",
        rows=[numbers[found.row] for found in group[:NAMED_ROWS]],
    )


def _lengths(
    result: Lint, calibration: Mapping[str, Any], numbers: Sequence[int], tokens: Sequence[int]
) -> list[LintFinding]:
    if "evaluation_tokens_median" not in result:
        return []
    limit = int(calibration["sequence_length"])
    seen = limit if calibration["packing"] else median(min(count, limit) for count in tokens)
    asked = result["evaluation_tokens_median"]
    if asked <= LENGTH_FACTOR * seen:
        return []
    shortest = sorted(range(len(tokens)), key=lambda place: tokens[place])[:NAMED_ROWS]
    return [
        LintFinding(
            kind="length",
            message=f"half of the evaluation's texts have more than about {asked:.0f} tokens, a "
            f"calibration sequence has {seen:.0f} (median): activations far into a text are not "
            "calibrated; use longer rows"
            + (
                ", packing: true or a larger sequence_length"
                if not calibration["packing"]
                else " and a larger sequence_length"
            ),
            rows=sorted(numbers[place] for place in shortest),
        )
    ]


def _languages(result: Lint, languages: Sequence[str], numbers: Sequence[int]) -> list[LintFinding]:
    """A language that one side has and the other one lacks."""
    calibrated, evaluated = result["languages"], result["evaluation_languages"]
    findings = []
    for code, share in evaluated.items():
        if code != UNKNOWN and share >= LANGUAGE_SHARE and code not in calibrated:
            message = (
                f"{share:.0%} of the evaluation's texts are in {code!r} and no calibration row is: "
                "quality in it is measured but not calibrated for; add rows in it"
            )
            findings.append(LintFinding(kind="language", message=message, rows=[]))
    for code, share in calibrated.items():
        if not evaluated or code == UNKNOWN or share < LANGUAGE_SHARE or code in evaluated:
            continue
        message = (
            f"{share:.0%} of the calibration rows are in {code!r} and no evaluation text is: what "
            "quantization costs in it is not measured; add a task or held-out text in it, or take "
            "the rows out if nobody will ask in it"
        )
        rows = [number for number, found in zip(numbers, languages, strict=True) if found == code]
        findings.append(LintFinding(kind="language", message=message, rows=rows[:NAMED_ROWS]))
    return findings


def _template(
    result: Lint, calibration: Mapping[str, Any], texts: Sequence[str], numbers: Sequence[int]
) -> list[LintFinding]:
    """Tasks that ask through the chat template, rows that have (nearly) none of it."""
    chats = calibration["rows_by_kind"].get("messages", 0)
    plain = [n for n, text in zip(numbers, texts, strict=True) if not has_marker(text)]
    # Rows of kind `text` may have been rendered by hand; they hold the template's markers then.
    templated = max(chats, len(texts) - len(plain)) / len(texts)
    if not result["evaluation_chat_template"] or templated >= TEMPLATED_SHARE:
        return []
    return [
        LintFinding(
            kind="template",
            message=f"tasks ask through the chat template, but {1 - templated:.0%} of the "
            "calibration rows are plain text: the activations of the template's own tokens are "
            "not calibrated; give rows as `messages`",
            rows=plain[:NAMED_ROWS],
        )
    ]


def _empty(
    result: Lint, calibration: Mapping[str, Any], numbers: Sequence[int], tokens: Sequence[int]
) -> list[LintFinding]:
    if result["padding_share"] <= EMPTY_SHARE:
        return []
    shortest = sorted(range(len(tokens)), key=lambda place: tokens[place])[:NAMED_ROWS]
    room = calibration["sequences"] * calibration["sequence_length"]
    return [
        LintFinding(
            kind="padding",
            message=f"{calibration['sequences']:,} sequences of {calibration['sequence_length']:,} "
            f"have room for {room:,} tokens and hold {calibration['tokens']:,} "
            f"({result['padding_share']:.0%} empty): set packing: true, give more samples, or "
            "lower sequence_length to what the rows have",
            rows=sorted(numbers[place] for place in shortest),
        )
    ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
