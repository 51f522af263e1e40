"""What two servers said of the same tokens: the arrays, KL divergence and Δp between them."""

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
from quantize.report.paired.intervals import Floats, Integers, chunks, resampled_mean, token_units
from quantize.report.paired.pairing import SAME_QUESTIONS

TAIL_FLOOR = 1e-6
"""Float32 log-probabilities do not tell 1 - Σp from zero below about this."""
DELTA_P_PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
"""Those that llama.cpp's `llama-perplexity --kl-divergence` prints."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What one side's server said of every scored token of the held-out text.

    `document`, `token` (tokens,); `logprob` (tokens,) in nats; `top_ids`, `top_logprobs`
    (tokens, k), padded with id -1 and -inf where the server gave fewer than k; `position`
    (tokens,): how many tokens of context it had.
    """

    document: Integers
    token: Integers
    position: Integers
    logprob: Floats
    top_ids: Integers
    top_logprobs: Floats

    @classmethod
    def load(cls, path: Path) -> TokenLogprobs:
        """Read `token_logprobs.npz` of a measure artifact; SourceError if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                side = cls.of(arrays)
        except SourceError as error:
            raise SourceError(f"{path}: {error.message}", error.hint) from error
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path} cannot be read: {error}", "quantize store verify") from error
        return side

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> TokenLogprobs:
        """From the file's narrow types to 64 bits, in which everything is computed."""
        return cls(
            document=arrays["document"].astype(np.int64),
            token=arrays["token"].astype(np.int64),
            position=arrays["position"].astype(np.int64),
            logprob=arrays["logprob"].astype(np.float64),
            top_ids=arrays["top_ids"].astype(np.int64),
            top_logprobs=arrays["top_logprobs"].astype(np.float64),
        )

    def __post_init__(self) -> None:
        tokens = len(self.token)
        columns = (self.document, self.position, self.logprob, self.top_ids, self.top_logprobs)
        if (
            {len(column) for column in columns} != {tokens}
            or self.top_ids.shape != self.top_logprobs.shape
            or tokens == 0
        ):
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
    names = ("text_sha256", "tokens_sha256", "window", "stride", "joined", "bos", "top_k")
    sides = (dict(baseline), dict(candidate))
    for name in names:
        before, after = (side[name] for side in sides)
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


def divergence(
    baseline: TokenLogprobs, candidate: TokenLogprobs, nats: Floats | None = None
) -> Divergence:
    """KL(baseline ‖ candidate) in nats per scored position, Δp and top-1 agreement.

    Mean (Σ over positions / positions, with a 95% interval from a bootstrap over documents as in
    :func:`quantize.report.paired.deltas.perplexity_delta`), median, 99th and 99.9th percentile and
    maximum of :func:`position_divergence`, which is a lower bound of the KL over the whole
    vocabulary; `nats` is its result where it is known already.

    Δp = p_candidate - p_baseline of the text's own token: mean, root mean square, percentiles.

    `top1_agreement` is the share of positions where the most likely token is the same; among
    equally likely tokens (common with BF16 logits) the lowest id counts, on both sides.

    Raises SourceError if the sides scored other tokens.
    """
    nats = position_divergence(baseline, candidate) if nats is None else nats
    median, p99, p999 = np.quantile(nats, [0.5, 0.99, 0.999])
    unit = token_units(baseline.document)
    tokens = np.bincount(unit).astype(np.float64)
    mean = resampled_mean(np.bincount(unit, weights=nats).astype(np.float64), tokens)
    delta_p = np.exp(candidate.logprob) - np.exp(baseline.logprob)  # (tokens,)
    percentiles = np.percentile(delta_p, DELTA_P_PERCENTILES)
    return Divergence(
        top_k=min(baseline.top_ids.shape[1], candidate.top_ids.shape[1]),
        tokens=len(nats),
        mean=float(nats.mean()),
        mean_low=mean.low,
        mean_high=mean.high,
        median=float(median),
        p99=float(p99),
        p999=float(p999),
        maximum=float(nats.max()),
        top1_agreement=float(np.mean(_most_likely(baseline) == _most_likely(candidate))),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt(np.mean(delta_p**2))),
        delta_p_percentiles={
            f"{name:g}": float(value)
            for name, value in zip(DELTA_P_PERCENTILES, percentiles, strict=True)
        },
    )


def position_divergence(baseline: TokenLogprobs, candidate: TokenLogprobs) -> Floats:
    """KL(baseline ‖ candidate) of each scored position (tokens,), in nats: a lower bound.

    Both servers report their own k most likely tokens and the text's token. At each position the
    vocabulary is cut into the tokens that both sides reported, one cell each, and one cell for all
    the others, whose mass on each side is 1 - Σp. KL over these cells, Σ p ln(p/q), is a lower
    bound of the KL over the vocabulary: merging cells is a function of the outcome, and no function
    of the outcome makes two distributions easier to tell apart (data-processing inequality). It is
    exact when k is the whole vocabulary.

    The log-probabilities are float32, so 1 - Σp is noise below `TAIL_FLOOR`; the last cell is not
    taken as smaller than that on either side, and a position is not taken as below zero.

    Raises SourceError if the sides scored other tokens.
    """
    check_paired(baseline, candidate)
    parts, start = [], 0
    width = baseline.top_ids.shape[1] + 1
    for count in chunks(len(baseline.token), 2_000_000 // width + 1):
        rows = slice(start, start + count)
        parts.append(_position_divergence(_cells(baseline, rows), _cells(candidate, rows)))
        start += count
    return np.concatenate(parts)


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
