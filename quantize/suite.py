"""Suites and prompts: what is measured, as data, under the same strictness as a recipe.

A suite (`eval/suites/*.yaml`) names held-out text, tasks, a load and a file of smoke prompts
(`eval/prompts/*.yaml`). :mod:`quantize.recipe_file` reads both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantize.block import Block, Fraction, PositiveInt


class TaskRef(Block):
    """One lm-eval task of a suite."""

    name: str = Field(description="Name of the lm-eval task.")
    metric: str = Field(description="The metric that is compared, e.g. acc or exact_match.")
    filter: str = Field("none", description="lm-eval's filter of that metric.")
    num_fewshot: Annotated[int, Field(ge=0)] = Field(0, description="Worked examples before it.")
    limit: PositiveInt | None = Field(None, description="Documents at most, from the start.")
    apply_chat_template: bool = Field(True, description="Ask through the chat template.")
    repeats: PositiveInt = Field(
        1, description="Times a sampled generation task is asked, each with another seed; averaged."
    )
    temperature: Annotated[float, Field(gt=0, le=2)] | None = Field(
        None, description="Sample at this temperature; the task's own decoding if absent."
    )
    cluster: str | None = Field(
        None,
        description="A field of the task's documents (a passage, a subject): documents that share "
        "it are not independent, and the standard error says so. Subtasks are clusters anyway.",
    )
    higher_is_better: bool = Field(True, description="Whether a larger score is a better one.")

    @model_validator(mode="after")
    def _repeats_sample(self) -> TaskRef:
        if self.repeats > 1 and self.temperature is None:
            raise ValueError("repeats without temperature: the same answer would come every time")
        return self


class PerplexityText(Block):
    """Held-out text and how it is cut: a local file, or one column of a Hub data set."""

    text: str = Field(
        min_length=1,
        description="A .jsonl file with `text` rows or a .txt file (relative to the suite file), "
        "or a Hub data set.",
    )
    revision: str | None = Field(None, description="Hub only: a commit hash.")
    config: str | None = Field(None, description="Hub only: the data set's configuration.")
    split: str = Field("test", description="Hub only: the split.")
    field: str = Field("text", description="The column (or JSON key) that holds the text.")
    join: bool = Field(
        False,
        description="Join the rows with blank lines before cutting, as is customary for WikiText; "
        "otherwise every row is cut by itself, and its last window may be short.",
    )
    window: Annotated[int, Field(gt=1)] = Field(
        512, description="Tokens per window, BOS included; the first is context only."
    )
    stride: PositiveInt | None = Field(
        None,
        description="Tokens between two windows' starts; window (no overlap) if absent. With "
        "less, a token is scored where it has the most context.",
    )
    bos: Literal["window", "once"] = Field(
        "window",
        description="Where BOS stands, if the tokenizer has one: before every window, or once "
        "before the text, as in the scripts behind the literature's WikiText-2 figures; those "
        "leave out what follows the last whole window, too.",
    )
    windows: PositiveInt | None = Field(None, description="Windows at most, from the start.")
    top_k: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="Log-probabilities kept per position, for KL divergence."
    )

    @model_validator(mode="after")
    def _windows_reach_each_other(self) -> PerplexityText:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} is longer than window {self.window}: the tokens between "
                "two windows would be left out"
            )
        return self


class Health(Block):
    """Longer generations whose form is looked at, not their content."""

    prompts: str = Field(min_length=1, description="A .jsonl file, relative to the suite file.")
    max_tokens: PositiveInt = Field(256, description="Tokens generated at most.")


class Quick(Block):
    """The stated subset that `quick` measures."""

    windows: PositiveInt = Field(32, description="Windows of held-out text at most, of each text.")
    documents: PositiveInt = Field(100, description="Documents of each task at most.")
    health_prompts: PositiveInt = Field(16, description="Prompts for generation health at most.")


class Load(Block):
    """The load under which latency and throughput are read."""

    requests: PositiveInt = Field(16, description="Requests in all.")
    concurrency: PositiveInt = Field(4, description="Requests under way at once.")
    input_tokens: PositiveInt = Field(128, description="Prompt tokens of each request.")
    output_tokens: PositiveInt = Field(64, description="Tokens generated by each request.")


class Suite(Block):
    """What is measured, as data: `eval/suites/*.yaml`."""

    version: Literal[1] = Field(description="The version of this format.")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = Field(
        description="Lower case, digits, . _ -"
    )
    description: str = Field("", description="For people; changes no key.")
    smoke: str = Field("default", min_length=1, description="A name in eval/prompts, or a path.")
    perplexity: PerplexityText | None = Field(None, description="Held-out text; none if absent.")
    tasks: tuple[TaskRef, ...] = Field((), description="lm-eval tasks, in the order of the table.")
    tasks_folder: str | None = Field(
        None, description="Folder of own tasks (relative to the suite file); Hub tasks need none."
    )
    health: Health | None = Field(None, description="Generation health; not measured if absent.")
    quick: Quick = Field(default_factory=Quick, description="What `--quick` measures of this.")
    load: Load = Field(default_factory=Load, description="The load that latency is read under.")

    @model_validator(mode="after")
    def _task_names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks named twice: {', '.join(twice)}")
        return self


SmokeKind = Literal["completion", "chat", "long_context", "concurrent"]
SmokeCheck = Literal["not_empty", "valid_utf8", "no_repetition", "no_template_echo", "finishes"]


class Message(Block):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: str = Field(min_length=1, description="What is said.")


class Prompt(Block):
    """One smoke prompt and what its answer must satisfy. Answers are greedy (temperature 0).

    Checks without a baseline: `not_empty` (something but white space), `valid_utf8` (no U+FFFD),
    `no_repetition` (no group of one to eight words stands six or more times in a row, and none of
    one to four characters 24 or more times),
    `no_template_echo` (no special token of the tokenizer in the text), `finishes` (the server says
    `stop`, not `length`), and every text of `contains`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = Field(
        description="Lower case, digits, _ -"
    )
    kind: SmokeKind = Field(
        description="completion, chat, long_context (a filler before the prompt) or concurrent "
        "(the same request several times at once; every answer is checked)."
    )
    prompt: str | None = Field(None, min_length=1, description="The text; or give messages.")
    messages: tuple[Message, ...] = Field((), description="Sent through the chat template.")
    max_tokens: PositiveInt = Field(64, description="Tokens generated at most.")
    filler: str | None = Field(
        None,
        min_length=1,
        description="long_context: repeated before the prompt, or before the last message's text.",
    )
    context_tokens: PositiveInt | None = Field(
        None,
        description="long_context: length of the filler in tokens; less where the server's "
        "max_model_len does not hold it with prompt and answer.",
    )
    copies: Annotated[int, Field(ge=2, le=256)] | None = Field(
        None, description="concurrent: requests at once (8 if absent)."
    )
    checks: tuple[SmokeCheck, ...] = Field(
        ("not_empty", "valid_utf8"), description="Conditions on the answer."
    )
    contains: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that the answer must hold, upper and lower case alike."
    )
    min_baseline_similarity: Fraction | None = Field(
        None,
        description="Lowest similarity of the candidate's answer to the baseline's: "
        "difflib.SequenceMatcher's ratio over words, 1 for equal answers.",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Prompt:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        if self.kind == "completion" and self.prompt is None:
            raise ValueError("kind completion takes a prompt, not messages")
        if self.kind == "chat" and not self.messages:
            raise ValueError("kind chat takes messages, not a prompt")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("the last of the messages must be the user's")
        long_context = self.kind == "long_context"
        if {self.filler is not None, self.context_tokens is not None} != {long_context}:
            raise ValueError("filler and context_tokens belong to kind long_context, both of them")
        if self.copies is not None and self.kind != "concurrent":
            raise ValueError("copies belongs to kind concurrent")
        return self


class Prompts(Block):
    """Smoke prompts, as data: `eval/prompts/*.yaml`."""

    version: Literal[1] = Field(description="The version of this format.")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = Field(
        description="Lower case, digits, . _ -"
    )
    description: str = Field("", description="For people; changes no key.")
    prompts: tuple[Prompt, ...] = Field(description="At least one, in the order they are sent.")

    @model_validator(mode="after")
    def _prompt_names_differ(self) -> Prompts:
        if not self.prompts:
            raise ValueError("a file of prompts needs at least one")
        names = [prompt.name for prompt in self.prompts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"prompts named twice: {', '.join(twice)}")
        return self
