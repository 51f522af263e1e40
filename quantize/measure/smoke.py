"""Smoke prompts: does the server answer, and does the answer look like language?

The prompts are data (`eval/prompts`); the checks here need no baseline. Whether the candidate says
what the baseline says is decided by the compare stage, on both records.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from quantize.measure.client import Answer, Client
from quantize.recipe import Prompt, Prompts
from quantize.records import Check, Smoke

REPEATS = 6
REPEATED_WORDS = 8
COPIES = 8
TEMPLATE_TOKENS = 32
"""Room left for what a chat template adds around a prompt."""


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
    """Say which group of one to eight words stands six or more times in a row, or nothing."""
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
    others = sum(len(client.tokenize(m.content, special=True)) for m in prompt.messages[:-1])
    own = len(client.tokenize(text, special=True)) + others + TEMPLATE_TOKENS
    room = client.max_model_len() - prompt.max_tokens - own
    length = min(prompt.context_tokens, room)
    per_copy = len(client.tokenize(prompt.filler, special=False))
    return " ".join([prompt.filler] * max(length // max(per_copy, 1), 1)) + "\n\n" + text
