"""The recipe: frozen, strict types, one class per block of the YAML file.

:mod:`quantize.recipe_file` turns a file into a :class:`Recipe` with line numbers in its errors;
``quantize schema`` prints the JSON schema of these classes. Descriptions are written for the editor
tooltip. A lower layer never reads the file again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["awq", "gptq", "awq+gptq", "rtn", "fp8", "int8"]
Scheme = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
]

DEFAULT_SCHEME: dict[str, str] = {
    "awq": "W4A16_ASYM",
    "gptq": "W4A16",
    "awq+gptq": "W4A16_ASYM",
    "rtn": "W4A16",
    "fp8": "FP8_DYNAMIC",
    "int8": "W8A8",
}
SCHEMES: dict[str, tuple[str, ...]] = {
    "awq": ("W4A16_ASYM", "W4A16", "W8A16"),
    "gptq": ("W4A16", "W4A16_ASYM", "W8A16", "W8A8"),
    "awq+gptq": ("W4A16_ASYM", "W4A16"),
    "rtn": ("W4A16", "W4A16_ASYM", "W8A16"),
    "fp8": ("FP8_DYNAMIC", "FP8", "FP8_BLOCK"),
    "int8": ("W8A8",),
}
"""Which schemes a method can produce, best first."""

GROUPED = frozenset({"W4A16", "W4A16_ASYM", "W8A16"})
"""Schemes whose scales are per group of input channels."""

DATA_FREE = frozenset({("rtn", s) for s in SCHEMES["rtn"]}) | {
    ("fp8", "FP8_DYNAMIC"),
    ("fp8", "FP8_BLOCK"),
}
"""(method, scheme) pairs that need no calibration data."""

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Block(BaseModel):
    """Shared strictness: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Block):
    """The fine-tuned checkpoint."""

    source: str = Field(
        min_length=1,
        description="A folder (relative to the recipe file, or a shipped one) or a Hub repository.",
    )
    revision: str | None = Field(
        None, description="Hub only: a commit hash; a branch or tag is resolved and pinned."
    )
    adapter: str | None = Field(
        None, description="A LoRA adapter (folder or Hub repository) to merge in BF16 first."
    )
    adapter_revision: str | None = Field(None, description="Hub only: the adapter's commit hash.")
    base: str | None = Field(
        None, description="The model that was fine-tuned; cards name it, retention is against it."
    )
    license: str | None = Field(
        None, description="SPDX-like Hub licence id, where the source's card does not say it."
    )

    @model_validator(mode="after")
    def _adapter_revision_has_adapter(self) -> Model:
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision without adapter: name the adapter or remove it")
        return self


class Calibration(Block):
    """The data that calibrated methods see."""

    source: str = Field(
        min_length=1, description="A .jsonl, .parquet or .txt file, or a Hub data set."
    )
    revision: str | None = Field(None, description="Hub only: a commit hash.")
    config: str | None = Field(None, description="Hub only: the data set's configuration.")
    split: str = Field("train", description="Hub only: the split.")
    samples: PositiveInt = Field(256, description="Sequences of token ids to calibrate on.")
    sequence_length: PositiveInt = Field(2048, description="Tokens per sequence at most.")
    packing: bool = Field(
        False, description="Join rows end to end so that every sequence is full (text rows)."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Which rows are drawn, and their order."
    )


class Quantize(Block):
    """What is done to the weights."""

    method: Method = Field(description="awq, gptq, awq+gptq, rtn (round to nearest), fp8 or int8.")
    scheme: Scheme | None = Field(None, description="Number formats; the method's best if absent.")
    group_size: PositiveInt | None = Field(
        None,
        description="Input channels that share a scale, for 4-bit schemes and W8A16 (default 128).",
    )
    ignore: tuple[str, ...] = Field(
        ("lm_head",), description="Modules left in BF16: names, or 're:' and a pattern."
    )
    engine: Literal["llmcompressor"] = Field("llmcompressor", description="Who quantizes.")
    dampening: Fraction = Field(
        0.01, description="GPTQ: share of the mean Hessian diagonal that is added to it."
    )
    activation_order: Literal["static", "weight", "none"] = Field(
        "static", description="GPTQ: the order in which columns are quantized."
    )

    @model_validator(mode="after")
    def _scheme_fits_method(self) -> Quantize:
        allowed = SCHEMES[self.method]
        if self.scheme is not None and self.scheme not in allowed:
            raise ValueError(
                f"method {self.method} cannot produce {self.scheme}: use {', '.join(allowed)}"
            )
        if self.group_size is not None and self.effective_scheme not in GROUPED:
            raise ValueError(f"scheme {self.effective_scheme} has no groups: remove group_size")
        return self

    @property
    def effective_scheme(self) -> str:
        """The scheme, with the method's default filled in."""
        return self.scheme or DEFAULT_SCHEME[self.method]

    @property
    def effective_group_size(self) -> int | None:
        """Input channels per scale, or None for per-channel, per-tensor and block schemes."""
        return (self.group_size or 128) if self.effective_scheme in GROUPED else None

    @property
    def needs_calibration(self) -> bool:
        """Whether the compress stage reads token ids."""
        return (self.method, self.effective_scheme) not in DATA_FREE


class Margins(Block):
    """How much worse the candidate may be before the run fails with exit code 7."""

    perplexity_ratio: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Highest allowed candidate/baseline perplexity, e.g. 1.05."
    )
    task_drop: Fraction | None = Field(
        None, description="Largest allowed drop of any task's score, absolute, e.g. 0.02."
    )


class Evaluate(Block):
    """What is measured, on both sides, through the server."""

    suite: str = Field(
        min_length=1, description="A name in eval/suites, or a path to a suite file."
    )
    margins: Margins = Field(default_factory=Margins, description="Limits; none if absent.")


class Serve(Block):
    """How the checkpoint is served, for the measurement and on the card."""

    engine: Literal["vllm"] = Field("vllm", description="The server.")
    max_model_len: PositiveInt | None = Field(
        None, description="Context length; the checkpoint's own if absent."
    )
    gpu_memory_utilization: Fraction = Field(0.90, description="Share of the GPU that vLLM takes.")
    kv_cache_gib: PositiveInt = Field(1, description="CPU only: GiB for the KV cache.")
    enable_prefix_caching: bool = Field(True, description="Share KV blocks of equal prefixes.")
    max_num_seqs: PositiveInt = Field(64, description="Sequences decoded together at most.")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs the measurement runs on.")
    tensor_parallel_sizes: tuple[PositiveInt, ...] = Field(
        (), description="Every size that users will serve with; checked for divisibility."
    )
    extra_args: tuple[str, ...] = Field((), description="More vLLM flags, as typed.")


class Hub(Block):
    """A repository on the Hub."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(description="owner/name")
    private: bool = Field(True, description="Visibility when the repository is created.")
    branch: str = Field("main", description="The branch that receives the commit.")


class Publish(Block):
    """Where the artifact goes."""

    folder: str | None = Field(None, description="A folder (relative to the working directory).")
    hub: Hub | None = Field(None, description="A Hub repository; needs a token that may write.")


class EnvironmentOverride(Block):
    """An environment that the user already has."""

    python: str = Field(description="Path of its Python interpreter.")


class Recipe(Block):
    """One checkpoint, one method, one measurement, one target."""

    version: Literal[1] = Field(description="The version of this format.")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$", max_length=80)] = Field(
        description="Names the run folder and the card: lower case, digits, . _ + -"
    )
    model: Model = Field(description="The fine-tuned checkpoint.")
    calibration: Calibration | None = Field(
        None, description="The data that calibrated methods see; dynamic FP8 and rtn need none."
    )
    quantize: Quantize = Field(description="What is done to the weights.")
    evaluate: Evaluate | None = Field(
        None, description="What is measured, on both sides; nothing if absent."
    )
    serve: Serve = Field(
        default_factory=Serve, description="How the checkpoint is served and measured."
    )
    publish: Publish = Field(
        default_factory=Publish, description="Where the artifact goes; the store only if absent."
    )
    environments: dict[Literal["llmcompressor", "vllm", "lmeval"], EnvironmentOverride] = Field(
        default_factory=dict, description="Use these interpreters instead of our own."
    )

    @model_validator(mode="after")
    def _calibration_present(self) -> Recipe:
        if self.quantize.needs_calibration and self.calibration is None:
            raise ValueError(
                f"method {self.quantize.method} with {self.quantize.effective_scheme} needs a "
                "calibration block"
            )
        return self


class TaskRef(Block):
    """One lm-eval task of a suite."""

    name: str = Field(description="Name of the lm-eval task.")
    metric: str = Field(description="The metric that is compared, e.g. acc or exact_match.")
    filter: str = Field("none", description="lm-eval's filter of that metric.")
    num_fewshot: Annotated[int, Field(ge=0)] = Field(0, description="Worked examples before it.")
    limit: PositiveInt | None = Field(None, description="Documents at most, from the start.")
    apply_chat_template: bool = Field(True, description="Ask through the chat template.")
    higher_is_better: bool = Field(True, description="Whether a larger score is a better one.")


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
    windows: PositiveInt | None = Field(None, description="Windows at most, from the start.")
    top_k: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="Log-probabilities kept per position, for KL divergence."
    )


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


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "quantize recipe, version 1"
    return schema
