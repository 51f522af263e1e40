"""The baseline measured twice: what the server's own nondeterminism changes."""

from __future__ import annotations

import numpy as np

from quantize.records import Noise, NoiseTask
from quantize.report.paired.deltas import lost_nats
from quantize.report.paired.divergence import TokenLogprobs, divergence
from quantize.report.paired.intervals import Floats
from quantize.report.paired.pairing import Paired


def add_text_noise(noise: Noise, baseline: TokenLogprobs, repeat: TokenLogprobs) -> None:
    """Perplexity ratio, share of log-probabilities that changed, KL and top-1 agreement.

    Raises SourceError if the two measurements scored other tokens.
    """
    kl = divergence(baseline, repeat)
    noise["perplexity_ratio"] = float(np.exp((baseline.logprob - repeat.logprob).mean()))
    noise["tokens_changed"] = float(np.mean(baseline.logprob != repeat.logprob))
    noise["kl_mean"] = kl["mean"]
    noise["top1_agreement"] = kl["top1_agreement"]


def task_noise(name: str, paired: Paired) -> NoiseTask:
    """One task of the baseline asked twice; `paired` holds both, a flip is a changed score."""
    change = paired.scores[1] - paired.scores[0]
    return NoiseTask(
        name=name,
        difference=float(change.mean()),
        flips=int((change != 0).sum()),
        documents=len(change),
    )


def task_level(paired: Paired) -> float:
    """The largest difference of a task's mean scores that is taken as the server's own."""
    change = paired.scores[1] - paired.scores[0]
    return noise_level(change, float(len(change)))


def text_level(baseline: TokenLogprobs, repeat: TokenLogprobs) -> float:
    """The same of a text's log perplexity ratio, in nats a token."""
    nats, tokens = lost_nats(baseline, repeat)
    return noise_level(nats, float(tokens.sum()))


def noise_level(changes: Floats, total: float) -> float:
    """max(|Σ changes|, √(Σ changes²)) / total; `changes` (units,) of one measurement repeated.

    Changes of single documents cancel in the sum by luck; the root of their squares is what the sum
    typically is when their signs fall at random.
    """
    return max(abs(float(changes.sum())), float(np.sqrt((changes**2).sum()))) / total
