"""Measurement records: versioned JSON, written by `measure` and `compare`, read by everyone else.

The report, the card and the tables are functions of these alone. Numbers are floats in the units
that the field names carry; a value that was not measured is absent from the record and named in
`not_measured` with the reason, never 0 and never null.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

MEASURE_SCHEMA = "quantize.measure/2"
COMPARE_SCHEMA = "quantize.compare/2"


class Subject(TypedDict):
    """The checkpoint folder that was served."""

    key: str  # key of the fetch or compress artifact
    bytes: int  # of all safetensors files
    parameters: int  # elements of the unquantized model's tensors
    adapter: NotRequired[str]  # key of the adapter that was served with it, as the model asked


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


class Dataset(TypedDict):
    """Where documents come from; `path` is a data set on the Hub or the name of a file format."""

    path: NotRequired[str]  # absent where subtasks differ in it, as are the others
    config: NotRequired[str]
    split: NotRequired[str]


class Perplexity(TypedDict):
    """Held-out text scored by the server.

    perplexity = exp(total_nats / scored_tokens); every window's first token is context only.
    Per-token values are in the artifact's file `token_logprobs.npz`: `document` (tokens,) int32,
    `token` (tokens,) int32, `logprob` (tokens,) float32 in nats, `top_ids` (tokens, k) int32,
    `top_logprobs` (tokens, k) float32 (padded with id -1, -inf), and `position` (tokens,) int32:
    how many tokens of context it had, BOS included. Of the user's own text the file is
    `own_token_logprobs.npz`.
    """

    text: str  # file name
    text_sha256: str
    dataset: NotRequired[Dataset]  # of a text from the Hub
    tokens_sha256: str  # of the windows' token ids: equal on both sides or not comparable
    documents: int
    windows: int
    window: int
    stride: int  # tokens between two windows' starts; equal to window - BOS: no overlap
    joined: bool  # rows joined by blank lines, as in the literature's WikiText-2
    bos: bool
    excluded: str  # which tokens are context only, in words
    top_k: int
    scored_tokens: int
    total_nats: float
    perplexity: float
    scored_by: NotRequired[Agreement]  # a library, where the server scores no prompt


class Agreement(TypedDict):
    """How far a library, which scored held-out text for a server that cannot, agrees with it.

    Both continued the beginnings of some windows greedily. `tokens_equal` counts those before a
    continuation's first difference, `largest_difference_nats` is that of the log-probabilities of
    the continuations' first tokens.
    """

    library: str  # with its version
    continuations: int
    tokens: int
    tokens_equal: int
    largest_difference_nats: float


class Task(TypedDict):
    """One lm-eval task.

    Per-document values are in the artifact's file `samples/<name>.jsonl`, a line each:
    {"doc": id, "group": str, "cluster": str, "prompt": str, "prompt_sha256": str, "target": str,
    "response": str, "score": float, "scores": [float, ...] of each repeat}.
    `cluster` is "" where documents are independent; `prompt` is the rendered text that was asked.
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
    repeats: int  # samples of each answer; the score is their mean
    clusters: NotRequired[int]  # groups of documents that are not independent
    dataset: NotRequired[Dataset]


class Answered(TypedDict):
    """One generation of `health.jsonl`: what came back for one prompt of generation health."""

    name: str
    prompt: str
    answer: str
    finish_reason: str
    tokens: int
    repeats: str  # what stands in a row, or ""
    replacement_characters: int  # U+FFFD: broken byte sequences
    echoed: NotRequired[list[str]]  # special tokens in the text, where the server writes them
    schema_error: NotRequired[str]  # prompts with a JSON schema: why it does not hold, or ""


class Health(TypedDict):
    """Form of longer generations, greedy: shares of the prompts, lengths in tokens.

    Per-prompt values are in the artifact's file `health.jsonl` (:class:`Answered`, a line each).
    """

    prompts: int
    prompts_sha256: str
    max_tokens: int
    repeating: float
    ended_early: float  # nothing but white space, or fewer than `EARLY_TOKENS` tokens
    cut_off: float  # by max_tokens
    invalid_utf8: float
    template_echo: NotRequired[float]  # absent where the server leaves special tokens out
    schema_prompts: int
    schema_valid: NotRequired[float]  # of the prompts with a schema
    tokens_median: float
    tokens_p10: float
    tokens_p90: float


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
    unpacked: NotRequired[str]  # why the weights were unpacked to BF16 to be served
    smoke: list[Smoke]
    perplexity: NotRequired[Perplexity]
    own_perplexity: NotRequired[Perplexity]  # of the user's own text
    tasks: list[Task]
    health: NotRequired[Health]
    serving: NotRequired[Serving]
    quick: bool  # the suite's quick subset
    concurrency: NotRequired[int]  # requests at once, from the server's KV capacity
    not_measured: list[Missing]
    versions: dict[str, str]
    seconds: dict[str, float]  # by part: server start, smoke, perplexity, task:<name>, load


VerdictName = Literal["non-inferior", "inferior", "inconclusive", "not comparable"]


class Verdict(TypedDict):
    """An interval held against a margin; all in the unit of the difference.

    `low` and `high` are the 95% interval of how much worse the candidate is (positive: worse).
    Non-inferior: high <= margin. Inferior: low > margin. Otherwise inconclusive.
    """

    name: str  # perplexity, own_perplexity, task:<name>, tasks (their average), model
    verdict: VerdictName
    worse: NotRequired[float]  # estimate
    low: NotRequired[float]
    high: NotRequired[float]
    margin: NotRequired[float]
    rule: str  # the margin in words: recovery 0.97 of 0.845
    counts: bool  # whether the gate asks for it
    adjusted_p: NotRequired[float]  # of inferiority, Holm over everything that counts
    more_documents: NotRequired[int]  # inconclusive: about so many more would decide
    reason: NotRequired[str]  # in words, where the figures do not say it


class PerplexityDelta(TypedDict):
    """Candidate against baseline on the same tokens."""

    baseline: float
    candidate: float
    ratio: float
    ratio_low: float  # 95% interval, bootstrap over documents
    ratio_high: float
    scored_tokens: int
    documents: int
    inside_noise: NotRequired[bool]  # |log ratio| at most what the baseline shows against itself


class Divergence(TypedDict):
    """KL(baseline ‖ candidate) over the baseline's top k and one bucket for the rest, in nats.

    Δp is the change of the probability of the text's own token, candidate - baseline.
    """

    top_k: int
    tokens: int
    mean: float
    mean_low: float  # 95% interval of the mean, bootstrap over documents
    mean_high: float
    median: float
    p99: float
    p999: float
    maximum: float
    top1_agreement: float  # share of positions where the most likely token is the same
    delta_p_mean: float
    delta_p_rms: float  # root of the mean of Δp squared
    delta_p_percentiles: dict[str, float]  # "0.1", "1", "5", "10", "25", "50", ... "99.9"


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
    clusters: NotRequired[int]  # the standard error is clustered by these
    lost: int  # worse than before; for 0/1 scores: right before, wrong after
    gained: int
    mcnemar_p: NotRequired[float]  # only for 0/1 scores
    # candidate / baseline (where lower is better, baseline / candidate), the baseline's above zero
    recovery: NotRequired[float]
    recovery_low: NotRequired[float]
    recovery_high: NotRequired[float]
    detectable: float  # smallest true loss found with 80% power at this n and discordance
    inside_noise: NotRequired[bool]


class Aggregate(TypedDict):
    """All tasks that count, together. Differences are averages over tasks, each weighing alike."""

    tasks: int
    documents: int
    worse: float  # how much worse, mean over tasks of the difference in the bad direction
    low: float
    high: float
    recovery: NotRequired[float]  # mean over tasks of candidate / baseline
    recovery_low: NotRequired[float]  # where higher is better in all tasks
    recovery_high: NotRequired[float]
    # One-sided p-values of "no task got worse" as in Kübler et al., arXiv:2602.10144
    pooled_p: NotRequired[float]
    fisher_p: NotRequired[float]
    max_p: NotRequired[float]


class Retention(TypedDict):
    """(candidate - base) / (fine-tune - base) of one task, with Fieller's 95% interval."""

    name: str
    metric: str
    base: float
    fine_tuned: float
    candidate: float
    gain: float
    gain_low: float
    gain_high: float
    retained: NotRequired[float]  # absent where the fine-tune gained nothing that can be told
    retained_low: NotRequired[float]
    retained_high: NotRequired[float]
    reason: NotRequired[str]


class NoiseTask(TypedDict):
    """One task of the baseline asked twice."""

    name: str
    difference: float
    flips: int
    documents: int


class Noise(TypedDict):
    """The baseline measured a second time, by a server started again."""

    perplexity_ratio: NotRequired[float]
    tokens_changed: NotRequired[float]  # share of log-probabilities that are not equal
    kl_mean: NotRequired[float]
    top1_agreement: NotRequired[float]
    tasks: list[NoiseTask]


class LintFinding(TypedDict):
    """Something about the calibration data that a person should know."""

    kind: str  # overlap, length, language, template, padding
    message: str
    rows: list[int]  # calibration rows, 1-based as in the file, the first few


class Lint(TypedDict):
    """The calibration data held against what is evaluated."""

    rows: int
    overlapping_rows: int  # share an n-gram of `ngram` words with an evaluation document
    ngram: int
    tokens_median: float  # of a calibration row
    evaluation_tokens_median: NotRequired[float]
    languages: dict[str, float]  # share of rows
    evaluation_languages: dict[str, float]
    chat_template_applied: bool
    evaluation_chat_template: bool
    padding_share: float
    findings: list[LintFinding]


class HealthDelta(TypedDict):
    """One rate of generation health on both sides, over the same prompts."""

    name: str  # a field of Health
    baseline: float
    candidate: float
    got_worse: int  # prompts that were fine before
    got_better: int
    mcnemar_p: float
    alarm: bool  # worse, and not by chance (p < 0.05)


class Gate(TypedDict):
    """One condition of the gate and whether the candidate keeps it."""

    name: str
    passed: bool
    says: str  # a sentence: what was found, against which limit, what would help


class SmokeDelta(TypedDict):
    """The greedy answers of both sides to one smoke prompt; different is not yet wrong."""

    name: str
    similarity: float  # difflib.SequenceMatcher's ratio over words, 1 for equal words
    identical: bool  # to the last character
    answered: bool  # with more than white space, unless the baseline's answer has no more either
    matches_baseline: NotRequired[bool]  # as similar as the prompt demands, where it demands that


class CompareRecord(TypedDict):
    """`record.json` of a compare artifact. Beside it, `details.json` (:class:`Details`)."""

    schema: str
    baseline: Subject
    candidate: Subject
    size_ratio: float  # candidate bytes / baseline bytes, safetensors files
    perplexity: NotRequired[PerplexityDelta]
    divergence: NotRequired[Divergence]
    own_perplexity: NotRequired[PerplexityDelta]
    own_divergence: NotRequired[Divergence]
    tasks: list[TaskDelta]
    aggregate: NotRequired[Aggregate]
    retention: list[Retention]
    noise: NotRequired[Noise]
    lint: NotRequired[Lint]
    health: list[HealthDelta]
    verdicts: list[Verdict]  # the last one is the model's
    gates: list[Gate]
    alarms: list[str]  # what is odd and no gate: sentences
    quick: bool
    smoke: list[SmokeDelta]  # prompts that both sides were asked
    smoke_failed: list[str]  # what the candidate's answers fail, as "prompt: check"
    not_measured: list[Missing]


class Series(TypedDict):
    """Means over positions in the window, in bins: [start, end) tokens of context."""

    starts: list[int]
    ends: list[int]
    tokens: list[int]
    baseline_nats: list[float]  # -log p per token
    candidate_nats: list[float]
    kl: list[float]


class Histogram(TypedDict):
    """Counts of tokens by Δ log p = candidate - baseline, nats; the outer bins are open."""

    edges: list[float]
    counts: list[int]


class Flip(TypedDict):
    """One document whose score changed."""

    doc: str
    prompt: str
    target: str
    baseline: str  # its answer
    candidate: str
    baseline_score: float
    candidate_score: float


class Details(TypedDict):
    """What the report draws and shows beyond the record; it holds evaluation documents.

    Not published: benchmarks must not get into training data through model cards.
    """

    series: dict[str, Series]  # by text: perplexity, own_perplexity
    delta_log_p: dict[str, Histogram]
    flips: dict[str, list[Flip]]  # by task; lost ones first, at most 200 each way
