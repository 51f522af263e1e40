"""What the report draws of every token, and the documents whose scores changed."""

from __future__ import annotations

import numpy as np

from quantize.records import Flip, Histogram, Series
from quantize.report.paired.divergence import TokenLogprobs
from quantize.report.paired.intervals import Floats
from quantize.report.paired.pairing import Paired, Sample

MOST_BINS = 32
HISTOGRAM_BINS = 61
"""Odd, so that the bin in the middle holds what did not change."""
MOST_FLIPS = 200
"""Documents shown of each direction."""
MOST_CHARACTERS = 4000
"""Of each text that is shown."""


def series(baseline: TokenLogprobs, candidate: TokenLogprobs, kl: Floats) -> Series:
    """Means by tokens of context; `kl` (tokens,) is that of each position, in nats.

    The bins are equally wide, a power of two tokens, at most `MOST_BINS` of them; those that hold
    no token are left out.
    """
    width = 1
    while baseline.position.max() >= width * MOST_BINS:
        width *= 2
    place = baseline.position // width
    tokens = np.bincount(place)
    used = np.flatnonzero(tokens)

    def means(values: Floats) -> list[float]:
        sums = np.bincount(place, weights=values)
        return [float(value) for value in sums[used] / tokens[used]]

    return Series(
        starts=[int(bin_ * width) for bin_ in used],
        ends=[int((bin_ + 1) * width) for bin_ in used],
        tokens=[int(count) for count in tokens[used]],
        baseline_nats=means(-baseline.logprob),
        candidate_nats=means(-candidate.logprob),
        kl=means(kl),
    )


def histogram(baseline: TokenLogprobs, candidate: TokenLogprobs) -> Histogram:
    """Δ log p of each token: counts[i] lie between edges[i-1] and edges[i].

    There is one count more than edges: the first is of what lies below the first edge, the last of
    what lies at or above the last one. The edges span ± the 99.5th percentile of |Δ|, rounded up to
    1, 2 or 5 times a power of ten.
    """
    change = candidate.logprob - baseline.logprob
    reach = _round_up(float(np.quantile(np.abs(change), 0.995)))
    edges = np.linspace(-reach, reach, HISTOGRAM_BINS + 1)
    counts = np.bincount(np.searchsorted(edges, change, side="right"), minlength=len(edges) + 1)
    return Histogram(edges=[float(edge) for edge in edges], counts=[int(n) for n in counts])


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten, at least 0.001."""
    value = max(value, 1e-3)
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9)))


def flips(paired: Paired, *, higher_is_better: bool) -> list[Flip]:
    """Documents whose score changed, lost ones first, the largest changes first.

    `paired` holds the baseline and the candidate; at most `MOST_FLIPS` each way, texts are cut at
    `MOST_CHARACTERS`.
    """
    before, after = paired.scores
    worse = before - after if higher_is_better else after - before
    lost = [place for place in np.argsort(-worse, kind="stable") if worse[place] > 0]
    gained = [place for place in np.argsort(worse, kind="stable") if worse[place] < 0]
    return [
        _flip(paired.samples[0][place], paired.samples[1][place])
        for place in [*lost[:MOST_FLIPS], *gained[:MOST_FLIPS]]
    ]


def _flip(before: Sample, after: Sample) -> Flip:
    return Flip(
        doc=str(before["doc"]),
        prompt=_clipped(before["prompt"]),
        target=_clipped(before["target"]),
        baseline=_clipped(before["response"]),
        candidate=_clipped(after["response"]),
        baseline_score=float(before["score"]),
        candidate_score=float(after["score"]),
    )


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
