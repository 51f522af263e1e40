"""Intervals and their tests, against other libraries and by simulation."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from quantize.report.paired import intervals
from quantize.report.paired.intervals import (
    ALPHA,
    Student,
    clustered_error,
    paired_mean,
    resampled_mean,
    token_units,
)


def covered(estimates, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])


def flips(generator, documents, lost, gained, trials):
    """Differences (trials, documents) of -1, 0, 1, as how much worse."""
    draws = generator.random((trials, documents))
    return (draws < lost).astype(float) - (draws > 1 - gained)


# --- textbook cases


def test_graded_scores_have_the_paired_t_interval():
    generator = np.random.default_rng(1)
    before, after = generator.random((2, 30))
    found = paired_mean(after - before, binary=False)
    known = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    one_sided = stats.ttest_rel(after, before, alternative="greater")
    assert found.p_above(0) == pytest.approx(one_sided.pvalue)


def test_binary_scores_have_bonett_and_price_s_interval():
    found = paired_mean(np.repeat([-1.0, 1.0, 0.0], [10, 2, 28]), binary=True)
    half = 1.959964 * np.sqrt((14 / 42 - (8 / 42) ** 2) / 42)
    assert found.value == pytest.approx(-0.2)
    assert found.low == pytest.approx(-8 / 42 - half, rel=1e-5)
    assert found.high == pytest.approx(-8 / 42 + half, rel=1e-5)


def test_an_interval_of_shares_stays_within_its_bounds():
    found = paired_mean(np.ones(3), binary=True)
    assert found.high == 1


def test_clustered_error_is_that_of_least_squares_on_a_constant():
    generator = np.random.default_rng(2)
    cluster = generator.integers(0, 12, 100)
    values = generator.normal(size=12)[cluster] + generator.normal(size=100)
    fit = sm.OLS(values, np.ones(100)).fit(cov_type="cluster", cov_kwds={"groups": cluster})
    assert clustered_error(values, cluster) == pytest.approx(fit.bse[0])
    found = paired_mean(values, cluster, binary=False)
    half = stats.t.ppf(0.975, 11) * fit.bse[0]
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_single_documents_as_clusters_give_the_plain_error():
    values = np.random.default_rng(3).normal(size=50)
    alone = clustered_error(values, np.arange(50))
    assert alone == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_the_test_and_the_interval_say_the_same():
    values = np.random.default_rng(4).normal(0.2, 1, 40)
    for found in (
        paired_mean(values, binary=False),
        paired_mean(values, np.arange(40) // 4, binary=False),
        paired_mean(np.sign(values), binary=True),
        resampled_mean(values, np.ones(40)),
    ):
        assert found.p_above(found.low) == pytest.approx(ALPHA, rel=0.01)
        assert found.p_above(found.high) == pytest.approx(1 - ALPHA, rel=0.01)
    certain = Student(0.1, 0.1, 0.0, 10)
    assert (certain.p_above(0.05), certain.p_above(0.1)) == (0, 1)


def test_a_bootstrap_claims_no_more_than_its_draws():
    found = resampled_mean(np.linspace(1, 2, 30), np.ones(30))
    assert 0 < found.p_above(0) < 1e-3
    assert found.p_above(3) == 1


def test_few_documents_are_resampled_in_blocks():
    assert token_units(np.repeat(np.arange(25), 2)).max() == 24
    blocks = np.bincount(token_units(np.zeros(50, int)))
    assert len(blocks) == 20
    assert set(blocks) == {2, 3}


# --- coverage


@pytest.mark.parametrize(("lost", "gained"), [(0.05, 0.03), (0.01, 0.01), (0.3, 0.1)])
def test_binary_intervals_cover_at_their_rate(lost, gained):
    draws = flips(np.random.default_rng(5), 300, lost, gained, 3000)
    rate = covered([paired_mean(row, binary=True) for row in draws], lost - gained)
    # Nominal 0.95, simulation error 0.004; few flips make it conservative.
    assert 0.938 <= rate <= 0.99


def test_graded_intervals_cover_at_their_rate():
    generator = np.random.default_rng(6)
    scores = generator.beta(2, 1, (3000, 60))
    rate = covered([paired_mean(row, binary=False) for row in scores], 2 / 3)
    assert 0.938 <= rate <= 0.962


@pytest.mark.parametrize("binary", [False, True])
def test_clustered_intervals_cover_and_others_would_not(binary):
    generator = np.random.default_rng(7)
    cluster = np.repeat(np.arange(50), generator.integers(4, 15, 50))
    effects = generator.normal(0, 1, (2000, 50))[:, cluster]
    values = effects + generator.normal(0, 1, effects.shape)
    if binary:
        values = (values > 1).astype(float) - (values < -1)
    clustered = covered([paired_mean(row, cluster, binary=binary) for row in values], 0)
    plain = covered([paired_mean(row, binary=binary) for row in values], 0)
    assert 0.93 <= clustered <= 0.965
    assert plain < 0.75


def test_bootstrap_intervals_cover_at_their_rate(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    generator = np.random.default_rng(8)
    found = []
    for _ in range(600):
        tokens = np.round(generator.lognormal(5, 0.5, 60))
        nats = 0.01 * tokens + np.sqrt(tokens) * generator.normal(0, 0.3, 60)
        found.append(resampled_mean(nats, tokens))
    # Nominal 0.95, simulation error 0.009; 0.025 and 0.006 on either side.
    assert 0.925 <= covered(found, 0.01) <= 0.975
    too_high = np.mean([estimate.low > 0.01 for estimate in found])
    assert 0.005 <= too_high <= 0.045
    by_test = np.mean([estimate.p_above(0.01) < ALPHA for estimate in found])
    assert by_test == pytest.approx(too_high, abs=0.005)


# --- power


@pytest.mark.parametrize(
    ("documents", "lost", "gained"), [(3920, 0.03, 0.02), (9000, 0.062, 0.052)]
)
def test_a_loss_of_one_point_is_found_as_often_as_promised(documents, lost, gained):
    """Both cases are such that a loss of 0.01 is about what is detectable."""
    draws = flips(np.random.default_rng(9), documents, lost, gained, 2500)
    found = [paired_mean(row, binary=True) for row in draws]
    promised = np.median([estimate.detectable for estimate in found])
    assert promised == pytest.approx(0.01, rel=0.15)
    power = np.mean([estimate.low > 0 for estimate in found])
    expected = stats.norm.cdf(0.01 / promised * (1.959964 + 0.841621) - 1.959964)
    assert power == pytest.approx(expected, abs=0.03)


def test_with_few_flips_the_promise_is_a_careful_one():
    """About 17 flips lost and 4 gained: a little more is found than is promised."""
    draws = flips(np.random.default_rng(9), 1300, 0.0128, 0.0028, 2500)
    found = [paired_mean(row, binary=True) for row in draws]
    assert np.median([estimate.detectable for estimate in found]) == pytest.approx(0.01, rel=0.03)
    assert 0.8 <= np.mean([estimate.low > 0 for estimate in found]) <= 0.87


def test_a_planted_loss_of_graded_scores_is_found_as_often_as_promised():
    draws = np.random.default_rng(10).normal(0.01, 0.1, (3000, 785))
    found = [paired_mean(row, binary=False) for row in draws]
    assert np.mean([estimate.detectable for estimate in found]) == pytest.approx(0.01, rel=0.02)
    assert np.mean([estimate.low > 0 for estimate in found]) == pytest.approx(0.8, abs=0.03)
