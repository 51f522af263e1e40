"""The baseline measured twice."""

import numpy as np
import pytest
from records_fixture import baseline_side, candidate_side, questions, token_arrays

from quantize.report.paired.divergence import TokenLogprobs
from quantize.report.paired.noise import (
    add_text_noise,
    noise_level,
    task_level,
    task_noise,
    text_level,
)
from quantize.report.paired.pairing import Paired


def paired(first, second):
    return Paired(np.array([first, second], dtype=float), None, ([], []))


def text(side):
    return TokenLogprobs.of(token_arrays(side.logits, *questions(), side.top_k))


def test_the_same_answers_twice_are_no_noise():
    same = paired([1, 0, 1], [1, 0, 1])
    assert task_noise("t", same) == {"name": "t", "difference": 0, "flips": 0, "documents": 3}
    assert task_level(same) == 0
    noise = {"tasks": []}
    add_text_noise(noise, text(baseline_side()), text(baseline_side()))
    assert noise == {
        "tasks": [],
        "perplexity_ratio": 1,
        "tokens_changed": 0,
        "kl_mean": 0,
        "top1_agreement": 1,
    }


def test_flips_that_cancel_are_still_noise():
    both_ways = paired([1, 0] * 50, [0, 1] * 2 + [1, 0] * 48)
    found = task_noise("t", both_ways)
    assert (found["difference"], found["flips"], found["documents"]) == (0, 4, 100)
    assert task_level(both_ways) == pytest.approx(2 / 100)  # √4 flips


def test_a_drift_in_one_direction_is_noise_in_full():
    assert task_level(paired([1] * 100, [0] * 9 + [1] * 91)) == pytest.approx(0.09)
    assert noise_level(np.array([-3.0, -4.0]), 10) == pytest.approx(0.7)


def test_noise_of_a_text():
    sides = text(baseline_side()), text(candidate_side(noise=0.01))
    noise = {"tasks": []}
    add_text_noise(noise, *sides)
    ratio = np.log(noise["perplexity_ratio"])
    assert ratio == pytest.approx((sides[0].logprob - sides[1].logprob).mean())
    assert noise["tokens_changed"] == 1
    assert 0 < noise["kl_mean"] < 1e-3
    assert abs(ratio) <= text_level(*sides) < 0.01
