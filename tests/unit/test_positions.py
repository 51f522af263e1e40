"""What the report draws: series by position, the histogram, flips."""

from itertools import pairwise

import numpy as np
import pytest
from records_fixture import baseline_side, candidate_side, questions, sample, token_arrays

from quantize.report.paired.divergence import TokenLogprobs, position_divergence
from quantize.report.paired.pairing import pair
from quantize.report.paired.positions import MOST_FLIPS, flips, histogram, series


def text(logprob, position, document=None):
    count = len(logprob)
    zeros = np.zeros(count, int)
    return TokenLogprobs(
        document=zeros if document is None else document,
        token=zeros,
        position=np.asarray(position),
        logprob=np.asarray(logprob, float),
        top_ids=np.zeros((count, 1), int),
        top_logprobs=np.asarray(logprob, float)[:, None],
    )


def test_series_are_means_over_equal_bins():
    position = np.array([1, 3, 40, 127])
    before = text([-1, -2, -3, -4], position)
    after = text([-1, -3, -3, -5], position)
    found = series(before, after, np.array([0.0, 0.2, 0.3, 0.4]))
    assert (found["starts"], found["ends"]) == ([0, 40, 124], [4, 44, 128])
    assert found["tokens"] == [2, 1, 1]
    assert found["baseline_nats"] == [1.5, 3, 4]
    assert found["candidate_nats"] == [2, 3, 5]
    assert found["kl"] == pytest.approx([0.1, 0.3, 0.4])


@pytest.mark.parametrize(("last", "width"), [(31, 1), (32, 2), (511, 16), (2047, 64), (2048, 128)])
def test_there_are_at_most_32_bins(last, width):
    side = text([-1.0] * (last + 1), np.arange(last + 1))
    found = series(side, side, np.zeros(last + 1))
    assert found["ends"][0] - found["starts"][0] == width
    assert len(found["starts"]) <= 32


def test_series_add_up_to_the_whole_text():
    sides = [
        TokenLogprobs.of(token_arrays(side.logits, *questions(), 8))
        for side in (baseline_side(), candidate_side())
    ]
    kl = position_divergence(*sides)
    found = series(*sides, kl)
    tokens = np.array(found["tokens"])
    assert tokens @ found["kl"] == pytest.approx(kl.sum())
    assert tokens @ found["candidate_nats"] == pytest.approx(-sides[1].logprob.sum())


def test_every_token_is_in_the_histogram_once():
    change = np.concatenate([np.full(5, -30.0), np.linspace(-0.9, 0.9, 985), np.full(10, 30.0)])
    position = np.arange(1000)
    found = histogram(text(np.full(1000, -40.0), position), text(-40 + change, position))
    edges, counts = np.array(found["edges"]), found["counts"]
    assert (edges[0], edges[-1]) == (-50, 50)
    assert len(counts) == len(edges) + 1
    assert sum(counts) == 1000
    for place, (low, high) in enumerate(pairwise(edges), 1):
        assert counts[place] == ((change >= low) & (change < high)).sum()


def test_the_outer_bins_are_open():
    change = np.concatenate([np.zeros(1000), [-7.0, 3.0, 3.0]])
    position = np.arange(1003)
    found = histogram(text(np.full(1003, -9.0), position), text(-9 + change, position))
    assert (found["edges"][0], found["edges"][-1]) == (-0.001, 0.001)
    assert (found["counts"][0], found["counts"][-1]) == (1, 2)
    middle = len(found["counts"]) // 2
    assert found["counts"][middle] == 1000


def answers(scores):
    return [sample("t", doc, score) for doc, score in enumerate(scores)]


def test_flips_show_what_was_lost_first_and_the_largest_first():
    before = answers([1, 0.2, 0.5, 1, 0])
    after = answers([0.5, 0.9, 0.5, 0, 0.1])
    after[3]["response"] = "x" * 5000
    paired = pair("t", baseline=before, candidate=after)
    found = flips(paired, higher_is_better=True)
    assert [flip["doc"] for flip in found] == ["3", "0", "1", "4"]
    assert found[0]["prompt"] == "t 3"
    assert (found[0]["baseline_score"], found[0]["candidate_score"]) == (1, 0)
    assert len(found[0]["candidate"]) == 4000
    assert found[0]["candidate"].endswith("…")
    lower = flips(paired, higher_is_better=False)
    assert [flip["doc"] for flip in lower] == ["1", "4", "3", "0"]


def test_there_are_not_too_many_flips():
    paired = pair("t", baseline=answers([1] * 300), candidate=answers([0] * 290 + [1] * 10))
    assert len(flips(paired, higher_is_better=True)) == MOST_FLIPS
    assert flips(pair("t", a=answers([1, 0]), b=answers([1, 0])), higher_is_better=True) == []
