"""Generation health: the form of longer answers, not their content.

Every prompt is asked once, greedy. The rates are shares of the prompts: with a repetition (as
:func:`quantize.measure.smoke.repetition` finds it), ended early, cut off by `max_tokens`, with
U+FFFD (a broken byte sequence), with one of the tokenizer's special tokens as text, and, of the
prompts with a JSON schema, with an answer that the schema accepts (by the `jsonschema` library,
draft 2020-12). One side's rates say little: a prompt may invite repetition. They are compared
prompt by prompt with the baseline's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from pydantic import Field, ValidationError, model_validator

from quantize.block import Block
from quantize.errors import SourceError, ToolError
from quantize.keys import digest
from quantize.measure.client import Answer, Client
from quantize.measure.smoke import repetition
from quantize.protocol import write_atomic
from quantize.records import Answered, Health, Missing
from quantize.suite import Message

EARLY_TOKENS = 4
"""Fewer generated tokens than these, the end token included, are an early end."""

BROKEN = "\ufffd"


class HealthPrompt(Block):
    """One line of a file of health prompts: plain text or messages, with or without a schema."""

    name: str = Field(min_length=1, description="Unique in the file.")
    prompt: str | None = Field(None, min_length=1, description="Continued as it stands.")
    messages: tuple[Message, ...] = Field((), description="Asked through the chat template.")
    json_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="The server is told to answer by this JSON schema."
    )

    @model_validator(mode="after")
    def _is_one(self) -> HealthPrompt:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def text(self) -> str:
        """The prompt as people read it."""
        if self.prompt is not None:
            return self.prompt
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


def read_prompts(path: Path, limit: int | None) -> list[HealthPrompt]:
    """The prompts of a .jsonl file, the first `limit` of them; SourceError with the line if bad."""
    prompts: list[HealthPrompt] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = HealthPrompt.model_validate_json(line)
            if prompt.json_schema is not None:
                Draft202012Validator.check_schema(prompt.json_schema)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _mistake(path, number, f"{where}: {first['msg']}".lstrip(": ")) from error
        except SchemaError as error:
            raise _mistake(path, number, f"schema: {error.message}") from error
        if prompt.name in {other.name for other in prompts}:
            raise _mistake(path, number, f"the name {prompt.name!r} stands twice")
        prompts.append(prompt)
    if not prompts:
        raise SourceError(f"{path} holds no prompts", "give it one JSON object a line")
    return prompts[:limit]


def measure(
    client: Client,
    prompts: Sequence[HealthPrompt],
    max_tokens: int,
    special_tokens: Sequence[str] | None,
    output: Path,
    concurrency: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Health | None, list[Missing]]:
    """Ask every prompt, write :class:`Answered` lines to `output`, return the rates.

    Without `special_tokens` nobody looks for them: a server that leaves them out would show none.

    A server that refuses structured output has no answer to prompts with a schema; what was
    refused, and why, is returned beside the rates. No rates if nothing was answered.
    """

    def ask(prompt: HealthPrompt) -> Answer | Missing:
        try:
            return _ask(client, prompt, max_tokens)
        except (SourceError, ToolError) as error:
            if prompt.json_schema is None or not client.healthy():
                raise
            return Missing(what=f"structured output of {prompt.name}", why=error.message)

    answered: list[tuple[HealthPrompt, Answered]] = []
    missing: list[Missing] = []
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask, prompt) for prompt in prompts]
        try:
            for done, (prompt, future) in enumerate(zip(prompts, futures, strict=True), 1):
                answer = future.result()
                if isinstance(answer, Answer):
                    answered.append((prompt, _look(prompt, answer, max_tokens, special_tokens)))
                else:
                    missing.append(answer)
                on_progress(done, len(prompts))
        except BaseException:  # what waits is not asked any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for _, answer in answered)
    write_atomic(output, "".join(lines))
    return (_rates(answered, max_tokens) if answered else None), list(_once(missing, prompts))


def _ask(client: Client, prompt: HealthPrompt, max_tokens: int) -> Answer:
    if prompt.prompt is not None:
        return client.complete(prompt.prompt, max_tokens, **_form(prompt))
    messages = [message.model_dump() for message in prompt.messages]
    return client.chat(messages, max_tokens, **_form(prompt))


def _form(prompt: HealthPrompt) -> dict[str, Any]:
    """Special tokens are wanted as text, and the schema where there is one."""
    form: dict[str, Any] = {"skip_special_tokens": False}
    if prompt.json_schema is not None:
        schema = {"name": "answer", "schema": prompt.json_schema}
        form["response_format"] = {"type": "json_schema", "json_schema": schema}
    return form


def _look(
    prompt: HealthPrompt, answer: Answer, max_tokens: int, special_tokens: Sequence[str] | None
) -> Answered:
    cut_off = answer.finish_reason == "length"
    # The last character may be half written when the tokens run out: that is no broken byte.
    whole = answer.text.rstrip(BROKEN) if cut_off else answer.text
    found: Answered = {
        "name": prompt.name,
        "prompt": prompt.text,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.completion_tokens,
        "repeats": repetition(answer.text),
        "replacement_characters": whole.count(BROKEN),
    }
    if special_tokens is not None:
        found["echoed"] = [token for token in special_tokens if token in answer.text]
    if prompt.json_schema is not None:
        fault = schema_error(prompt.json_schema, answer.text)
        cut = f"cut off after {max_tokens} tokens: " if fault and cut_off else ""
        found["schema_error"] = cut + fault
    return found


def schema_error(schema: dict[str, Any], text: str) -> str:
    """Why the text is no JSON value that the schema accepts; "" if it is one."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    fault = best_match(Draft202012Validator(schema).iter_errors(value))
    return f"{fault.json_path}: {fault.message}" if fault is not None else ""


def _rates(answered: Sequence[tuple[HealthPrompt, Answered]], max_tokens: int) -> Health:
    answers = [answer for _, answer in answered]

    def share(fault: Callable[[Answered], bool]) -> float:
        return sum(map(fault, answers)) / len(answers)

    p10, median, p90 = np.percentile([answer["tokens"] for answer in answers], (10, 50, 90))
    checked = [answer["schema_error"] for answer in answers if "schema_error" in answer]
    health: Health = {
        "prompts": len(answers),
        "prompts_sha256": digest([prompt.model_dump(mode="json") for prompt, _ in answered]),
        "max_tokens": max_tokens,
        "repeating": share(lambda answer: bool(answer["repeats"])),
        "ended_early": share(ended_early),
        "cut_off": share(lambda answer: answer["finish_reason"] == "length"),
        "invalid_utf8": share(lambda answer: answer["replacement_characters"] > 0),
        "schema_prompts": len(checked),
        "tokens_median": float(median),
        "tokens_p10": float(p10),
        "tokens_p90": float(p90),
    }
    if all("echoed" in answer for answer in answers):
        health["template_echo"] = share(lambda answer: bool(answer["echoed"]))
    if checked:
        health["schema_valid"] = checked.count("") / len(checked)
    return health


def ended_early(answer: Answered) -> bool:
    """Whether there is nothing but white space, or fewer than `EARLY_TOKENS` tokens."""
    return not answer["answer"].strip() or answer["tokens"] < EARLY_TOKENS


def _once(missing: Sequence[Missing], prompts: Sequence[HealthPrompt]) -> Iterator[Missing]:
    """One line where every prompt with a schema was refused, else a line each."""
    asked = sum(prompt.json_schema is not None for prompt in prompts)
    if missing and len(missing) == asked:
        yield Missing(what="structured output", why=missing[0]["why"])
    else:
        yield from missing


def _mistake(path: Path, number: int, what: str) -> SourceError:
    return SourceError(f"{path}:{number}: {what}", "each line is one JSON object; see eval/README")
