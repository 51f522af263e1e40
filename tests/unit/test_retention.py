"""What is left of the fine-tune's gain."""

import numpy as np
import pytest
from records_fixture import task_record

from quantize.report.paired.intervals import paired_mean
from quantize.report.paired.pairing import Paired
from quantize.report.paired.retention import retention


def kept(base, tuned, candidate, cluster=None, **task):
    scores = np.array([base, tuned, candidate], dtype=float)
    return retention({**task_record("t", [1]), **task}, Paired(scores, cluster, ([], [], [])))


def three_models(generator, documents):
    """0/1 answers: base right with 0.3; the fine-tune gains 0.42, of which 10% is lost again."""
    base = generator.random(documents) < 0.3
    tuned = base | (generator.random(documents) < 0.6)
    lost = tuned & ~base & (generator.random(documents) < 0.1)
    return base, tuned, tuned & ~lost


def test_half_of_the_gain_is_left():
    found = kept([0] * 100, [1] * 80 + [0] * 20, [1] * 40 + [0] * 60)
    assert (found["base"], found["fine_tuned"], found["candidate"]) == (0, 0.8, 0.4)
    assert found["gain"] == pytest.approx(0.8)
    assert found["retained"] == pytest.approx(0.5)
    assert 0.35 < found["retained_low"] < 0.5 < found["retained_high"] < 0.65


def test_an_identical_copy_keeps_everything_but_not_with_certainty():
    tuned = [1] * 60 + [0] * 40
    found = kept([0] * 100, tuned, tuned)
    assert found["retained"] == 1
    assert found["retained_low"] < 1 < found["retained_high"]


def test_where_lower_is_better():
    generator = np.random.default_rng(1)
    base = generator.normal(3, 0.1, 200)
    found = kept(base, base - 1, base - 0.9, higher_is_better=False)
    assert found["gain"] == pytest.approx(1)
    assert found["retained"] == pytest.approx(0.9)


def test_no_gain_has_no_quotient():
    same = [1, 0] * 50
    found = kept(same, same, same)
    assert "retained" not in found
    assert "cannot be told from its base" in found["reason"]
    worse = kept([1] * 100, [0] * 50 + [1] * 50, [1] * 100)
    assert "retained" not in worse
    assert "worse than its base" in worse["reason"]
    assert worse["gain_high"] < 0


def test_fieller_s_interval_holds_the_quotients_that_are_not_refuted():
    """Its ends are where the mean of left - ρ gained is just told from 0."""
    generator = np.random.default_rng(2)
    base = generator.normal(0, 1, 40)
    tuned = base + generator.normal(2, 1, 40)
    candidate = tuned - generator.normal(0.4, 0.5, 40)
    found = kept(base, tuned, candidate)
    for end in (found["retained_low"], found["retained_high"]):
        rest = paired_mean((candidate - base) - end * (tuned - base), binary=False)
        assert min(abs(rest.low), abs(rest.high)) == pytest.approx(0, abs=1e-9)


def test_the_documents_are_shared():
    """Answers that move together make a narrow interval; unrelated ones a wide one."""
    generator = np.random.default_rng(3)
    base, tuned, candidate = three_models(generator, 400)
    together = kept(base, tuned, candidate)
    order = generator.permutation(400)
    apart = kept(base, tuned, candidate[order])
    widths = [found["retained_high"] - found["retained_low"] for found in (together, apart)]
    assert widths[0] < 0.6 * widths[1]


def test_binary_intervals_cover_at_their_rate():
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(1500):
        found = kept(*three_models(generator, 300))
        hits += found["retained_low"] <= 0.9 <= found["retained_high"]
    # Nominal 0.95, simulation error 0.006; the flips added make it a little conservative.
    assert 0.935 <= hits / 1500 <= 0.98


@pytest.mark.parametrize("clustered", [False, True])
def test_graded_intervals_cover_at_their_rate(clustered):
    generator = np.random.default_rng(5)
    cluster = np.repeat(np.arange(60), 4)
    hits = 0
    for _ in range(1500):
        shared = generator.normal(0, 1, 60)[cluster] if clustered else 0
        gain = 1 + shared + generator.normal(0, 1, 240)
        loss = 0.2 + generator.normal(0, 0.5, 240)
        base = generator.normal(0, 1, 240)
        tuned, candidate = base + gain, base + gain - loss
        found = kept(base, tuned, candidate, cluster if clustered else None)
        hits += found["retained_low"] <= 0.8 <= found["retained_high"]
    assert 0.93 <= hits / 1500 <= 0.968
