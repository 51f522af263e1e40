"""Several tasks together."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from quantize.report.paired.aggregate import (
    aggregate,
    average,
    fisher_p,
    max_p,
    mcnemar_p,
    pooled_p,
)
from quantize.report.paired.intervals import Student, paired_mean


def test_one_sided_mcnemar_is_half_the_two_sided_one():
    for lost, gained in [(10, 2), (30, 12), (5, 0)]:
        known = mcnemar([[50, lost], [gained, 20]], exact=True).pvalue
        assert mcnemar_p(lost, lost + gained) == pytest.approx(known / 2)
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(2, 12) == pytest.approx(1 - 13 / 4096)


def test_pooled_is_one_test_of_all_flips():
    assert pooled_p([(6, 8), (4, 4)]) == mcnemar_p(10, 12)


def test_fisher_textbook_formula():
    flips = [(8, 10), (5, 9), (3, 3)]
    values = [mcnemar_p(*flip) for flip in flips]
    statistic = -2 * np.log(values).sum()
    assert fisher_p(flips) == pytest.approx(stats.chi2.sf(statistic, 6))


@pytest.mark.parametrize("flips", [[(5, 5), (2, 6)], [(3, 7), (4, 4), (0, 3)], [(1, 1), (0, 0)]])
def test_max_is_exact_over_every_way_the_flips_could_have_fallen(flips):
    seen = min(mcnemar_p(*flip) for flip in flips)
    total = 0.0
    for outcome in product(*(range(n + 1) for _, n in flips)):
        values = [mcnemar_p(lost, n) for lost, (_, n) in zip(outcome, flips, strict=True)]
        chance = np.prod(
            [stats.binom.pmf(k, n, 0.5) for k, (_, n) in zip(outcome, flips, strict=True)]
        )
        total += chance * (min(values) <= seen * (1 + 1e-12))
    assert max_p(flips) == pytest.approx(total)


def test_without_any_flip_nothing_is_said():
    assert (pooled_p([(0, 0)]), fisher_p([(0, 0)]), max_p([(0, 0), (0, 0)])) == (1, 1, 1)


def test_with_no_loss_they_reject_at_most_as_often_as_they_say():
    generator = np.random.default_rng(1)
    lost = generator.binomial([20, 35, 50], 0.5, (1200, 3))
    runs = [list(zip(row.tolist(), [20, 35, 50], strict=True)) for row in lost]
    for test, least in ((pooled_p, 0.03), (fisher_p, 0.02), (max_p, 0.02)):
        rate = np.mean([test(run) <= 0.05 for run in runs])
        assert least <= rate <= 0.05 + 3 * 0.0063


def test_each_finds_what_it_is_best_at():
    spread, single = [(14, 22)] * 4, [(11, 22)] * 3 + [(21, 22)]
    assert pooled_p(spread) < 0.01 < max_p(spread)
    assert max_p(single) < 0.001 < pooled_p(single)


def test_the_average_weighs_tasks_alike():
    large = paired_mean(np.repeat([1.0, 0.0], [10, 990]), binary=True)
    small = paired_mean(np.repeat([1.0, 0.0], [5, 45]), binary=True)
    found = average([large, small])
    assert found.value == pytest.approx((0.01 + 0.1) / 2)
    assert found.error == pytest.approx(np.hypot(large.error, small.error) / 2)
    assert found.freedom == np.inf
    alike = [Student(0, 0, 1, 10), Student(0, 0, 1, 10)]
    assert average(alike).freedom == pytest.approx(20)
    assert average([Student(0, 0, 0.0, 10)]).freedom == np.inf


def test_the_average_covers_at_its_rate():
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(1500):
        binary = (generator.random(150) < 0.06).astype(float)
        graded = generator.normal(0.02, 0.2, 30)
        found = average([paired_mean(binary, binary=True), paired_mean(graded, binary=False)])
        hits += found.low <= 0.04 <= found.high
    assert 0.935 <= hits / 1500 <= 0.97


def test_the_mean_recovery_has_the_interval_of_losses_in_shares():
    """One task: that of its own recovery. Two: independent errors, each over its own score."""
    lost = [Student(0.02, 0.02, 0.01, np.inf), Student(0.03, 0.03, 0.02, np.inf)]
    tasks = [
        task("a", 5, 3, baseline=0.5, recovery=0.96),
        task("b", 9, 5, baseline=0.8, recovery=1 - 0.03 / 0.8),
    ]
    one = aggregate(tasks[:1], lost[:1])
    assert one["recovery_low"] == pytest.approx(1 - (0.02 + 1.959964 * 0.01) / 0.5)
    assert one["recovery_high"] == pytest.approx(1 - (0.02 - 1.959964 * 0.01) / 0.5)
    both = aggregate(tasks, lost)
    error = np.hypot(0.01 / 0.5, 0.02 / 0.8) / 2
    assert both["recovery_high"] - both["recovery_low"] == pytest.approx(2 * 1.959964 * error)
    assert (both["recovery_low"] + both["recovery_high"]) / 2 == pytest.approx(both["recovery"])
    down = [tasks[0], tasks[1] | {"higher_is_better": False}]
    assert "recovery_low" not in aggregate(down, lost)


def task(name, lost, gained, **more):
    scores = {"higher_is_better": True, "baseline": 1.0}
    return {"name": name, "documents": 100, "lost": lost, "gained": gained, **scores, **more}


def test_the_aggregate_of_a_record():
    estimates = [Student(0.02, 0.02, 0.01, np.inf), Student(0.04, 0.04, 0.01, np.inf)]
    both = [
        task("a", 5, 3, mcnemar_p=0.7, recovery=0.98),
        task("b", 9, 5, mcnemar_p=0.4, recovery=0.95),
    ]
    found = aggregate(both, estimates)
    assert (found["tasks"], found["documents"]) == (2, 200)
    assert found["worse"] == pytest.approx(0.03)
    assert found["recovery"] == pytest.approx(0.965)
    assert found["pooled_p"] == mcnemar_p(14, 22)
    graded = aggregate([task("a", 5, 3), both[1]], estimates)
    assert graded["pooled_p"] == mcnemar_p(9, 14)
    assert "recovery" not in graded
    assert "max_p" not in aggregate([task("a", 5, 3)], estimates[:1])
