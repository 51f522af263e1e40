"""What two servers said of the same tokens: the arrays, and KL divergence between them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.errors import SourceError
from quantize.records import Divergence, Perplexity
from quantize.report.intervals import chunks

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TAIL_FLOOR = 1e-6
"""Float32 log-probabilities do not tell 1 - Σp from zero below about this."""
SAME_QUESTIONS = (
    "compare the tokenizers and chat templates of the two checkpoints: the audit names what differs"
)


@dataclass(frozen=True)
class TokenLogprobs:
    """What one side's server said of every scored token of the held-out text.

    `document`, `token` (tokens,); `logprob` (tokens,) in nats; `top_ids`, `top_logprobs`
    (tokens, k), padded with id -1 and -inf where the server gave fewer than k.
    """

    document: Integers
    token: Integers
    logprob: Floats
    top_ids: Integers
    top_logprobs: Floats

    @classmethod
    def load(cls, path: Path) -> TokenLogprobs:
        """Read `token_logprobs.npz` of a measure artifact; SourceError if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls.of(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path} cannot be read: {error}", "quantize store verify") from error

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> TokenLogprobs:
        """From the file's narrow types to 64 bits, in which everything is computed."""
        return cls(
            document=arrays["document"].astype(np.int64),
            token=arrays["token"].astype(np.int64),
            logprob=arrays["logprob"].astype(np.float64),
            top_ids=arrays["top_ids"].astype(np.int64),
            top_logprobs=arrays["top_logprobs"].astype(np.float64),
        )

    def __post_init__(self) -> None:
        tokens = len(self.token)
        shapes = {len(self.document), len(self.logprob), len(self.top_ids), len(self.top_logprobs)}
        if shapes != {tokens} or self.top_ids.shape != self.top_logprobs.shape or tokens == 0:
            raise SourceError("the arrays of token log-probabilities do not belong together")
        if not np.isfinite(self.logprob).all():
            place = int(np.argmin(np.isfinite(self.logprob)))
            raise SourceError(
                f"the server gave scored token {place} the log-probability {self.logprob[place]}",
                "look at the server's log in the run folder: the checkpoint computes NaN or Inf",
            )
        if np.isnan(self.top_logprobs).any() or (self.top_ids < 0).all(axis=1).any():
            raise SourceError("a position lacks its most likely tokens, or they are NaN")


def same_text(baseline: Perplexity, candidate: Perplexity) -> None:
    """Raise SourceError, naming what differs, unless both sides scored the same token ids."""
    pairs: dict[str, tuple[object, object]] = {
        "text_sha256": (baseline["text_sha256"], candidate["text_sha256"]),
        "tokens_sha256": (baseline["tokens_sha256"], candidate["tokens_sha256"]),
        "window": (baseline["window"], candidate["window"]),
        "bos": (baseline["bos"], candidate["bos"]),
        "top_k": (baseline["top_k"], candidate["top_k"]),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise SourceError(
                f"perplexities are not comparable: {name} is {before} for the baseline "
                f"and {after} for the candidate",
                SAME_QUESTIONS,
            )


def check_paired(baseline: TokenLogprobs, candidate: TokenLogprobs) -> None:
    """Raise SourceError unless both sides hold the same tokens of the same documents."""
    for name in ("token", "document"):
        before: Integers = getattr(baseline, name)
        after: Integers = getattr(candidate, name)
        if not np.array_equal(before, after):
            first, second = (hashlib.sha256(a.tobytes()).hexdigest()[:12] for a in (before, after))
            raise SourceError(
                f"the two sides scored different text: sha256 of `{name}` is {first} for the "
                f"baseline ({len(before)} tokens) and {second} for the candidate ({len(after)})",
                SAME_QUESTIONS,
            )


def divergence(baseline: TokenLogprobs, candidate: TokenLogprobs) -> Divergence:
    """KL(baseline ‖ candidate) in nats per scored position: mean, quantiles, maximum.

    Both servers report their own k most likely tokens and the text's token. At each position the
    vocabulary is cut into the tokens that both sides reported, one cell each, and one cell for all
    the others, whose mass on each side is 1 - Σp. KL over these cells, Σ p ln(p/q), is a lower
    bound of the KL over the vocabulary: merging cells is a function of the outcome, and no function
    of the outcome makes two distributions easier to tell apart (data-processing inequality). It is
    exact when k is the whole vocabulary.

    The log-probabilities are float32, so 1 - Σp is noise below `TAIL_FLOOR`; the last cell is not
    taken as smaller than that on either side, and a position is not taken as below zero.

    `top1_agreement` is the share of positions where the most likely token is the same; among
    equally likely tokens (common with BF16 logits) the lowest id counts, on both sides.

    Raises SourceError if the sides scored other tokens.
    """
    check_paired(baseline, candidate)
    parts, start = [], 0
    width = baseline.top_ids.shape[1] + 1
    for count in chunks(len(baseline.token), 2_000_000 // width + 1):
        rows = slice(start, start + count)
        parts.append(_position_divergence(_cells(baseline, rows), _cells(candidate, rows)))
        start += count
    nats = np.concatenate(parts)
    median, p99, p999 = np.quantile(nats, [0.5, 0.99, 0.999])
    return Divergence(
        top_k=min(baseline.top_ids.shape[1], candidate.top_ids.shape[1]),
        tokens=len(nats),
        mean=float(nats.mean()),
        median=float(median),
        p99=float(p99),
        p999=float(p999),
        maximum=float(nats.max()),
        top1_agreement=float(np.mean(_most_likely(baseline) == _most_likely(candidate))),
    )


def _cells(side: TokenLogprobs, rows: slice) -> tuple[Integers, Floats]:
    """Reported ids and log-probabilities, (rows, k+1).

    The text's token is there once; unused places have id -1.
    """
    token = side.token[rows, None]
    top = np.where(side.top_ids[rows] == token, -1, side.top_ids[rows])
    ids = np.concatenate([top, token], axis=1)
    logprobs = np.concatenate([side.top_logprobs[rows], side.logprob[rows, None]], axis=1)
    return ids, logprobs


def _position_divergence(
    baseline: tuple[Integers, Floats], candidate: tuple[Integers, Floats]
) -> Floats:
    """KL of each position (rows,) over the shared cells and the rest."""
    ids_p, log_p = baseline
    ids_q, log_q = candidate
    # One sorted array of (row, id) numbers of the candidate; the baseline's are looked up in it.
    stride = int(max(ids_p.max(), ids_q.max())) + 2
    row = np.arange(len(ids_p))[:, None] * stride
    known = (row + ids_q + 1).ravel()
    order = np.argsort(known, kind="stable")
    wanted = row + ids_p + 1
    place = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    # A token of probability zero goes with the rest, whose floor keeps the bound finite.
    shared = (ids_p >= 0) & (known[place] == wanted)
    shared &= np.isfinite(log_p) & np.isfinite(log_q.ravel()[place])
    log_p = np.where(shared, log_p, -np.inf)
    log_q = np.where(shared, log_q.ravel()[place], -np.inf)
    p, q = np.exp(log_p), np.exp(log_q)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=shared)
    rest_p = np.maximum(1 - p.sum(axis=1), TAIL_FLOOR)
    rest_q = np.maximum(1 - q.sum(axis=1), TAIL_FLOOR)
    nats = (p * ratio).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    positions: Floats = np.maximum(nats, 0)
    return positions


def _most_likely(side: TokenLogprobs) -> Integers:
    """The id with the highest log-probability at each position (tokens,)."""
    best = side.top_logprobs.max(axis=1, keepdims=True)
    beyond = np.iinfo(np.int64).max
    ids: Integers = np.where(side.top_logprobs == best, side.top_ids, beyond).min(axis=1)
    return ids
