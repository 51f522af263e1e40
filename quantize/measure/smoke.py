"""Smoke prompts: does the server answer, and does the answer look like language?

The prompts are data (`eval/prompts`); the checks here need no baseline. Whether the candidate says
what the baseline says is decided by the compare stage, on both records.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from quantize.measure.client import Answer, Client
from quantize.records import Check, Smoke
from quantize.suite import Prompt, Prompts

REPEATS = 6
REPEATED_WORDS = 8
COPIES = 8
CHARACTERS = re.compile(r"([^\s]{1,4}?)\1{23,}")
RULE = re.compile(r"[-=_*.~#|+]+")
SEAM_TOKENS = 8
"""Room left for tokens that join otherwise where the filler meets the prompt."""


def measure(
    client: Client,
    prompts: Prompts,
    special_tokens: Sequence[str],
    on_progress: Callable[[int, int], None],
) -> list[Smoke]:
    """Ask every prompt, in order; one record an answer, `name-2` and so on for copies."""
    records: list[Smoke] = []
    for done, prompt in enumerate(prompts.prompts, 1):
        text = _text(client, prompt)
        copies = (prompt.copies or COPIES) if prompt.kind == "concurrent" else 1
        with ThreadPoolExecutor(copies) as pool:
            answers = list(pool.map(lambda _: _ask(client, prompt, text), range(copies)))  # noqa: B023
        for number, answer in enumerate(answers, 1):
            record: Smoke = {
                "name": prompt.name if number == 1 else f"{prompt.name}-{number}",
                "kind": prompt.kind,
                "prompt": text,
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "completion_tokens": answer.completion_tokens,
                "seconds": answer.seconds,
                "checks": checks(prompt, answer, special_tokens),
            }
            if prompt.min_baseline_similarity is not None:  # decided by the compare stage
                record["min_baseline_similarity"] = prompt.min_baseline_similarity
            records.append(record)
        on_progress(done, len(prompts.prompts))
    return records


def checks(prompt: Prompt, answer: Answer, special_tokens: Sequence[str]) -> list[Check]:
    """The prompt's conditions on one answer, each with what was seen."""
    text = answer.text
    found: list[Check] = []
    for name in prompt.checks:
        match name:
            case "not_empty":
                problem = "" if text.strip() else "the answer is empty"
            case "valid_utf8":
                problem = "U+FFFD in the answer" if "\ufffd" in text else ""
            case "no_repetition":
                problem = repetition(text)
            case "no_template_echo":
                echoed = [token for token in special_tokens if token in text]
                problem = f"special tokens in the answer: {', '.join(echoed)}" if echoed else ""
            case "finishes":
                stopped = answer.finish_reason == "stop"
                problem = "" if stopped else f"it ended by {answer.finish_reason}"
        found.append({"name": name, "passed": not problem, "detail": problem})
    for expected in prompt.contains:
        held = expected.casefold() in text.casefold()
        detail = "" if held else f"no {expected!r} in the answer"
        found.append({"name": f"contains {expected}", "passed": held, "detail": detail})
    return found


def repetition(text: str) -> str:
    """Say which group of one to eight words stands six or more times in a row, or nothing.

    A group of one to four characters without a space that stands 24 or more times in a row is
    found too: a broken kernel's output is a row of `!` as often as not. Rules (`----`) are text.
    """
    for found in CHARACTERS.finditer(text):
        if not RULE.fullmatch(found[1]):
            return f"{found[1]!r} stands {len(found[0]) // len(found[1])} times in a row"
    words = text.split()
    for size in range(1, REPEATED_WORDS + 1):
        groups = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        for offset in range(size):
            for group, run in itertools.groupby(groups[offset::size]):
                if sum(1 for _ in run) >= REPEATS:
                    return f"{' '.join(group)!r} stands {REPEATS} or more times in a row"
    return ""


def _ask(client: Client, prompt: Prompt, text: str) -> Answer:
    if not prompt.messages:
        return client.complete(text, prompt.max_tokens)
    messages = [message.model_dump() for message in prompt.messages]
    messages[-1]["content"] = text
    return client.chat(messages, prompt.max_tokens)


def _text(client: Client, prompt: Prompt) -> str:
    """The prompt, or the last message's content, behind its filler."""
    text = prompt.prompt if prompt.prompt is not None else prompt.messages[-1].content
    if prompt.filler is None or prompt.context_tokens is None:
        return text
    if prompt.messages:
        own = client.tokenize_chat([message.model_dump() for message in prompt.messages])
    else:
        own = client.tokenize(text, special=True)
    room = client.max_model_len() - prompt.max_tokens - len(own) - SEAM_TOKENS
    length = min(prompt.context_tokens, room)
    # With the space before it: some tokenizers count it.
    copies = [len(client.tokenize(" ".join([prompt.filler] * n), special=False)) for n in (1, 2)]
    per_copy = max(copies[1] - copies[0], copies[0], 1)
    return " ".join([prompt.filler] * max(length // per_copy, 1)) + "\n\n" + text
