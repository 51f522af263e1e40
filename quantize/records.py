"""Measurement records: versioned JSON, written by `measure` and `compare`, read by everyone else.

The report, the card and the tables are functions of these alone. Numbers are floats in the units
that the field names carry; a value that was not measured is absent from the record and named in
`not_measured` with the reason, never 0 and never null.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

MEASURE_SCHEMA = "quantize.measure/1"
COMPARE_SCHEMA = "quantize.compare/1"


class Subject(TypedDict):
    """The checkpoint folder that was served."""

    key: str  # key of the fetch or compress artifact
    bytes: int  # of all safetensors files
    parameters: int  # elements of the unquantized model's tensors


class Server(TypedDict):
    """The server process that answered."""

    name: str
    version: str
    command: list[str]  # with paths replaced by placeholders
    accelerator: str
    device: str
    start_seconds: float


class Check(TypedDict):
    """One condition on one answer."""

    name: str
    passed: bool
    detail: str


class Smoke(TypedDict):
    """One smoke prompt and what came back."""

    name: str
    kind: Literal["completion", "chat", "long_context", "concurrent"]
    prompt: str
    answer: str
    finish_reason: str
    completion_tokens: int
    seconds: float
    checks: list[Check]
    min_baseline_similarity: NotRequired[float]  # the prompt's own demand, for `compare`


class Perplexity(TypedDict):
    """Held-out text scored by the server.

    perplexity = exp(total_nats / scored_tokens); every window's first token is context only.
    Per-token values are in the artifact's file `token_logprobs.npz`: `document` (tokens,) int32,
    `token` (tokens,) int32, `logprob` (tokens,) float32 in nats, `top_ids` (tokens, k) int32,
    `top_logprobs` (tokens, k) float32 (padded with id -1, -inf).
    """

    text: str  # file name
    text_sha256: str
    tokens_sha256: str  # of the windows' token ids: equal on both sides or not comparable
    documents: int
    windows: int
    window: int
    bos: bool
    top_k: int
    scored_tokens: int
    total_nats: float
    perplexity: float


class Task(TypedDict):
    """One lm-eval task.

    Per-document values are in the artifact's file `samples/<name>.jsonl`, a line each:
    {"doc": id, "group": str, "prompt_sha256": str, "target": str, "response": str, "score": float}.
    """

    name: str
    version: str
    metric: str
    higher_is_better: bool
    score: float
    standard_error: float
    documents: int
    num_fewshot: int
    chat_template: bool
    prompts_sha256: str  # of all rendered prompts in order


class Serving(TypedDict):
    """What the server said of itself under the suite's load."""

    requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    time_to_first_token_ms_median: float
    time_to_first_token_ms_p99: float
    # (latency - time to first token) / (tokens - 1): a stream may hand over several tokens at once
    time_per_output_token_ms_median: float
    output_tokens_per_second: float
    requests_per_second: float
    kv_cache_tokens: NotRequired[int]
    prometheus: dict[str, float]  # end-of-run values of selected metrics


class Missing(TypedDict):
    """Something that was not measured, and why."""

    what: str
    why: str


class MeasureRecord(TypedDict):
    """`record.json` of a measure artifact."""

    schema: str
    subject: Subject
    suite: str
    server: NotRequired[Server]
    smoke: list[Smoke]
    perplexity: NotRequired[Perplexity]
    tasks: list[Task]
    serving: NotRequired[Serving]
    not_measured: list[Missing]
    versions: dict[str, str]
    seconds: dict[str, float]  # by part: server start, smoke, perplexity, task:<name>, load


class PerplexityDelta(TypedDict):
    """Candidate against baseline on the same tokens."""

    baseline: float
    candidate: float
    ratio: float
    ratio_low: float  # 95% interval, bootstrap over documents
    ratio_high: float
    scored_tokens: int
    documents: int


class Divergence(TypedDict):
    """KL(baseline ‖ candidate) over the baseline's top k and one bucket for the rest, in nats."""

    top_k: int
    tokens: int
    mean: float
    median: float
    p99: float
    p999: float
    maximum: float
    top1_agreement: float  # share of positions where the most likely token is the same


class TaskDelta(TypedDict):
    """Candidate minus baseline, paired by document; low and high are the 95% interval."""

    name: str
    metric: str
    higher_is_better: bool
    baseline: float
    candidate: float
    difference: float
    difference_low: float
    difference_high: float
    standard_error: float
    documents: int
    lost: int  # worse than before; for 0/1 scores: right before, wrong after
    gained: int
    mcnemar_p: NotRequired[float]  # only for 0/1 scores


class Gate(TypedDict):
    """One margin of the recipe and whether the candidate keeps it."""

    name: str
    limit: float
    value: float
    passed: bool


class SmokeDelta(TypedDict):
    """The greedy answers of both sides to one smoke prompt; different is not yet wrong."""

    name: str
    similarity: float  # difflib.SequenceMatcher's ratio over words, 1 for equal words
    identical: bool  # to the last character
    answered: bool  # with more than white space, unless the baseline's answer has no more either
    matches_baseline: NotRequired[bool]  # as similar as the prompt demands, where it demands that


class CompareRecord(TypedDict):
    """`record.json` of a compare artifact."""

    schema: str
    baseline: Subject
    candidate: Subject
    size_ratio: float  # candidate bytes / baseline bytes, safetensors files
    perplexity: NotRequired[PerplexityDelta]
    divergence: NotRequired[Divergence]
    tasks: list[TaskDelta]
    gates: list[Gate]
    smoke: list[SmokeDelta]  # prompts that both sides were asked
    smoke_failed: list[str]  # what the candidate's answers fail, as "prompt: check"
    not_measured: list[Missing]
