"""Paired differences: perplexity, KL divergence and tasks."""

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from records_fixture import (
    baseline_side,
    candidate_side,
    questions,
    sample,
    task_record,
    token_arrays,
)
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from quantize.errors import SourceError
from quantize.report.paired import deltas
from quantize.report.paired.divergence import TokenLogprobs, divergence, same_text
from quantize.report.paired.pairing import Paired, pair


def arrays(logits, token=None, document=None, k=8):
    if token is None:
        token, document = questions()
    return TokenLogprobs.of(token_arrays(np.asarray(logits, float), token, document, k))


def perplexity_delta(before, after):
    return deltas.perplexity_delta(before, after)[0]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def full_kl(before, after):
    """KL over the whole vocabulary, straight from its definition."""
    p, q = log_softmax(before), log_softmax(after)
    return (np.exp(p) * (p - q)).sum(axis=1)


# --- perplexity


def test_identical_sides_have_ratio_one_and_no_divergence():
    side = arrays(baseline_side().logits)
    delta = perplexity_delta(side, side)
    assert (delta["ratio"], delta["ratio_low"], delta["ratio_high"]) == (1, 1, 1)
    assert delta["baseline"] == delta["candidate"]
    kl = divergence(side, side)
    assert kl["mean"] == kl["maximum"] == 0
    assert kl["top1_agreement"] == 1


def test_perplexity_is_exp_of_mean_surprise():
    token, document = np.zeros(40, int), np.arange(40) // 2
    delta = perplexity_delta(
        arrays(np.log([[0.5, 0.25, 0.25]] * 40), token, document, 2),
        arrays(np.log([[0.25, 0.5, 0.25]] * 40), token, document, 2),
    )
    assert delta["baseline"] == pytest.approx(2, rel=1e-6)
    assert delta["candidate"] == pytest.approx(4, rel=1e-6)
    assert delta["ratio"] == pytest.approx(2, rel=1e-6)
    # Every document moved alike: the interval is the point.
    assert delta["ratio_low"] == pytest.approx(delta["ratio_high"], rel=1e-6)
    assert (delta["documents"], delta["scored_tokens"]) == (20, 40)


def test_ratio_weighs_tokens_not_documents():
    document = np.array([0] * 30 + list(range(1, 31)))
    lost = np.where(document == 0, np.log(2), 0.0)  # half of all tokens, one of 31 documents
    before = arrays(np.zeros((60, 4)), np.zeros(60, int), document, 4)
    after = replace(before, logprob=before.logprob - lost)
    delta = perplexity_delta(before, after)
    assert delta["ratio"] == pytest.approx(np.sqrt(2))
    assert 1 <= delta["ratio_low"] < delta["ratio"] < delta["ratio_high"] <= 2


def test_one_long_document_still_has_an_interval():
    token, _ = questions()
    one = np.zeros(len(token), int)
    delta = perplexity_delta(
        arrays(baseline_side().logits, token, one), arrays(candidate_side().logits, token, one)
    )
    assert delta["documents"] == 1
    assert delta["ratio_low"] < delta["ratio"] < delta["ratio_high"]


def test_interval_does_not_change_from_run_to_run():
    sides = arrays(baseline_side().logits), arrays(candidate_side().logits)
    assert perplexity_delta(*sides) == perplexity_delta(*sides)


def test_the_estimate_is_the_ratio_less_one():
    sides = arrays(baseline_side().logits), arrays(candidate_side().logits)
    delta, worse = deltas.perplexity_delta(*sides)
    assert worse.value == pytest.approx(delta["ratio"] - 1)
    assert worse.low == pytest.approx(delta["ratio_low"] - 1)
    assert worse.p_above(worse.low) == pytest.approx(0.025, rel=0.05)


def test_too_little_text_is_an_error():
    token, document = np.zeros(19, int), np.zeros(19, int)
    side = arrays(np.zeros((19, 4)), token, document, 2)
    with pytest.raises(SourceError, match="19 scored tokens are too few"):
        perplexity_delta(side, side)


def test_other_tokens_are_an_error_that_names_the_array():
    token, document = questions()
    other = token.copy()
    other[3] = (other[3] + 1) % 32
    before = arrays(baseline_side().logits)
    after = arrays(baseline_side().logits, other, document)
    for function in (perplexity_delta, divergence):
        with pytest.raises(SourceError, match="sha256 of `token` is"):
            function(before, after)
    moved = arrays(baseline_side().logits, token, document + (np.arange(len(token)) > 7))
    with pytest.raises(SourceError, match="sha256 of `document` is"):
        perplexity_delta(before, moved)


def test_records_of_different_texts_are_not_comparable():
    record = {"text_sha256": "a", "tokens_sha256": "b", "window": 512, "stride": 511}
    record |= {"joined": False, "bos": True, "top_k": 8}
    same_text(record, dict(record))
    with pytest.raises(SourceError, match="tokens_sha256 is b for the baseline and c"):
        same_text(record, {**record, "tokens_sha256": "c"})


def test_infinite_log_probability_is_an_error():
    side = arrays(baseline_side().logits)
    broken = side.logprob.copy()
    broken[5] = -np.inf
    with pytest.raises(SourceError, match="scored token 5 the log-probability -inf"):
        replace(side, logprob=broken)


def test_a_file_that_is_no_archive_is_an_error(tmp_path):
    path = tmp_path / "token_logprobs.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(SourceError, match="cannot be read"):
        TokenLogprobs.load(path)


# --- divergence


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 12),
    spread=st.floats(0.1, 6),
    noise=st.floats(0, 4),
)
def test_divergence_is_a_lower_bound_and_exact_with_the_whole_vocabulary(seed, k, spread, noise):
    generator = np.random.default_rng(seed)
    before = spread * generator.normal(size=(50, 12))
    after = before + noise * generator.normal(size=before.shape)
    token, document = generator.integers(0, 12, 50), np.arange(50)
    truth = full_kl(before, after)

    bound = divergence(arrays(before, token, document, k), arrays(after, token, document, k))
    assert bound["mean"] <= truth.mean() + 2e-6
    assert bound["maximum"] <= truth.max() + 2e-6
    assert bound["mean"] >= 0

    whole = divergence(arrays(before, token, document, 12), arrays(after, token, document, 12))
    assert whole["mean"] == pytest.approx(truth.mean(), abs=1e-5)
    assert whole["maximum"] == pytest.approx(truth.max(), abs=1e-5, rel=1e-5)
    assert whole["p99"] == pytest.approx(np.quantile(truth, 0.99), abs=1e-5, rel=1e-5)
    agreement = np.mean(before.argmax(axis=1) == after.argmax(axis=1))
    assert whole["top1_agreement"] == bound["top1_agreement"] == agreement


def test_divergence_over_the_shared_tokens_and_the_rest():
    """Both sides report token 0 and the text's token 3; tokens 1, 2, 4 fall into the rest."""
    before = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
    after = np.array([0.4, 0.1, 0.3, 0.1, 0.1])
    token, document = np.full(20, 3), np.arange(20)
    found = divergence(
        arrays(np.log([before] * 20), token, document, 2),
        arrays(np.log([after] * 20), token, document, 2),
    )
    expected = 0.5 * np.log(0.5 / 0.4) + 0.1 * np.log(1) + 0.4 * np.log(0.4 / 0.5)
    assert found["mean"] == pytest.approx(expected, rel=1e-5)
    assert (found["top_k"], found["tokens"]) == (2, 20)


def test_the_mean_s_interval_and_delta_p():
    sides = arrays(baseline_side().logits), arrays(candidate_side().logits)
    found = divergence(*sides)
    assert found["mean_low"] < found["mean"] < found["mean_high"]
    change = np.exp(sides[1].logprob) - np.exp(sides[0].logprob)
    assert found["delta_p_mean"] == pytest.approx(change.mean())
    assert found["delta_p_rms"] == pytest.approx(np.sqrt((change**2).mean()))
    percentiles = found["delta_p_percentiles"]
    names = ["0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9"]
    assert list(percentiles) == names
    assert percentiles["25"] == pytest.approx(np.percentile(change, 25))


def test_the_mean_s_interval_covers_at_its_rate(monkeypatch):
    """Each document has its own mean KL; the truth is their population's."""
    monkeypatch.setattr("quantize.report.paired.intervals.RESAMPLES", 500)
    generator = np.random.default_rng(2)
    document, hits = np.repeat(np.arange(60), 5), 0
    before = arrays(np.log([[0.5, 0.5]] * 300), np.zeros(300, int), document, 2)
    for _ in range(300):
        # KL((½, ½) ‖ (q, 1-q)) = -½ ln(4 q (1-q))
        nats = generator.gamma(4, 0.01, 60)[document]
        q = (1 - np.sqrt(1 - np.exp(-2 * nats))) / 2
        logits = np.log(np.stack([q, 1 - q], axis=1))
        found = divergence(before, arrays(logits, np.zeros(300, int), document, 2))
        hits += found["mean_low"] <= 0.04 <= found["mean_high"]
    assert 0.91 <= hits / 300 <= 0.985


def test_divergence_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch):
    sides = arrays(baseline_side().logits), arrays(candidate_side().logits)
    whole = divergence(*sides)
    monkeypatch.setattr(
        "quantize.report.paired.divergence.chunks", lambda total, size: [7] * 34 + [2]
    )
    assert divergence(*sides) == whole


def test_padded_places_count_for_nothing():
    token, document = questions()
    side = token_arrays(baseline_side().logits, token, document, 8)
    padded = {
        **side,
        "top_ids": np.pad(side["top_ids"], ((0, 0), (0, 3)), constant_values=-1),
        "top_logprobs": np.pad(side["top_logprobs"], ((0, 0), (0, 3)), constant_values=-np.inf),
    }
    other = arrays(candidate_side().logits)
    plain, wide = (divergence(TokenLogprobs.of(s), other) for s in (side, padded))
    assert plain == wide


def test_equally_likely_tokens_agree_whatever_order_they_come_in():
    token, document = np.zeros(20, int), np.arange(20)
    tied = np.log([[0.4, 0.4, 0.2]] * 20)
    before = arrays(tied, token, document, 3)
    after = replace(
        before,
        top_ids=before.top_ids[:, [1, 0, 2]],
        top_logprobs=before.top_logprobs[:, [1, 0, 2]],
    )
    found = divergence(before, after)
    assert found["top1_agreement"] == 1
    assert found["maximum"] == 0


# --- tasks


def answers(scores, name="valley_mc"):
    return [sample(name, doc, score) for doc, score in enumerate(scores)]


def delta_of(before, after, cluster_of=0, **changes):
    task = {**task_record("valley_mc", before), **changes}
    sides = [
        [sample("valley_mc", doc, score, cluster_of=cluster_of) for doc, score in enumerate(scores)]
        for scores in (before, after)
    ]
    return deltas.task_delta(task, pair("valley_mc", baseline=sides[0], candidate=sides[1]))[0]


def test_mcnemar_textbook_case():
    """Ten documents lost and two gained: P = 2 · Σ C(12, i)/2¹² for i ≤ 2 = 158/4096."""
    before = [1] * 10 + [0] * 2 + [1] * 20 + [0] * 8
    after = [0] * 10 + [1] * 2 + [1] * 20 + [0] * 8
    delta = delta_of(before, after)
    assert (delta["lost"], delta["gained"], delta["documents"]) == (10, 2, 40)
    assert delta["mcnemar_p"] == pytest.approx(158 / 4096)
    assert delta["difference"] == pytest.approx(-0.2)
    differences = np.array(after) - np.array(before)
    assert delta["standard_error"] == pytest.approx(differences.std(ddof=1) / np.sqrt(40))
    # Bonett and Price: p = 3/42 up, 11/42 down.
    half = 1.959964 * np.sqrt((14 / 42 - (8 / 42) ** 2) / 42)
    assert delta["difference_low"] == pytest.approx(-8 / 42 - half, rel=1e-5)
    assert delta["difference_high"] == pytest.approx(-8 / 42 + half, rel=1e-5)


def test_no_flip_is_no_difference_but_not_certainty():
    delta = delta_of([1, 0, 1, 1], [1, 0, 1, 1])
    assert (delta["difference"], delta["lost"], delta["gained"]) == (0, 0, 0)
    assert delta["mcnemar_p"] == 1
    assert delta["difference_low"] < 0 < delta["difference_high"]


def test_graded_scores_have_the_t_interval_and_no_mcnemar():
    before, after = [0.5, 0.25, 1.0, 0.75], [0.5, 0.5, 0.75, 0.25]
    delta = delta_of(before, after)
    known = stats.ttest_rel(after, before)
    low, high = known.confidence_interval(0.95)
    assert (delta["difference_low"], delta["difference_high"]) == pytest.approx((low, high))
    assert delta["difference"] / delta["standard_error"] == pytest.approx(known.statistic)
    assert (delta["lost"], delta["gained"]) == (2, 1)
    assert "mcnemar_p" not in delta


def test_exact_mcnemar_is_statsmodels():
    delta = delta_of([1] * 9 + [0] * 4 + [1] * 7, [0] * 9 + [1] * 4 + [1] * 7)
    known = mcnemar([[7, 9], [4, 0]], exact=True)
    assert delta["mcnemar_p"] == pytest.approx(known.pvalue)


def test_documents_of_one_passage_are_not_independent():
    """Whole passages of five are lost: twenty flips are four observations."""
    before = [1] * 200
    after = [0] * 20 + [1] * 180
    apart, together = delta_of(before, after), delta_of(before, after, cluster_of=5)
    groups = {"groups": np.arange(200) // 5}
    fit = sm.OLS(np.array(after) - np.array(before), np.ones(200)).fit(
        cov_type="cluster", cov_kwds=groups
    )
    assert together["clusters"] == 40
    assert together["standard_error"] == pytest.approx(fit.bse[0])
    assert together["difference_low"] < apart["difference_low"] < -0.1
    assert together["detectable"] > 2 * apart["detectable"]
    assert "clusters" not in apart


def test_recovery_and_its_interval_say_what_the_difference_says():
    delta = delta_of([1] * 80 + [0] * 20, [1] * 76 + [0] * 4 + [0] * 20)
    assert delta["recovery"] == pytest.approx(0.95)
    assert delta["recovery_low"] == pytest.approx(1 + delta["difference_low"] / 0.8)
    assert delta["recovery_high"] == pytest.approx(1 + delta["difference_high"] / 0.8)
    lower = delta_of([1.0, 2.0, 3.0, 2.0], [2.0, 3.0, 3.0, 2.0], higher_is_better=False)
    assert lower["recovery"] == pytest.approx(2 / 2.5)
    assert lower["recovery_low"] == pytest.approx(2 / (2 + lower["difference_high"]))
    assert lower["recovery_low"] < lower["recovery"] < lower["recovery_high"]
    assert "recovery" not in delta_of([0, 0, 0], [0, 1, 0])


def test_the_interval_of_recovery_covers_the_population_s():
    """Baseline right with 0.8; one in twenty of its right answers is lost: recovery 0.95."""
    generator = np.random.default_rng(1)
    task, hits = task_record("t", [1]), 0
    for _ in range(1000):
        before = generator.random(300) < 0.8
        after = before & (generator.random(300) > 0.05)
        paired = Paired(np.array([before, after], dtype=float), None, ([], []))
        delta, _ = deltas.task_delta(task, paired)
        hits += delta["recovery_low"] <= 0.95 <= delta["recovery_high"]
    assert 0.93 <= hits / 1000 <= 0.985


def test_detectable_is_wider_than_the_interval_by_the_power():
    delta = delta_of([1] * 50 + [0] * 50, [0] * 5 + [1] * 45 + [0] * 50)
    half = (delta["difference_high"] - delta["difference_low"]) / 2
    assert delta["detectable"] == pytest.approx(half * (1.959964 + 0.841621) / 1.959964, rel=1e-5)
    unchanged = delta_of([1] * 50 + [0] * 50, [1] * 50 + [0] * 50)
    assert 0 < unchanged["detectable"] < 0.05


def test_lost_means_worse_for_a_metric_that_should_be_low():
    delta = delta_of([0.1, 0.2], [0.3, 0.2], higher_is_better=False)
    assert (delta["lost"], delta["gained"]) == (1, 0)
    assert delta["difference"] == pytest.approx(0.1)


# --- pairing


def test_answers_are_paired_by_document_not_by_line():
    full = answers([1, 0, 1])
    found = pair("t", baseline=full, candidate=full[::-1])
    assert found.scores.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert found.binary
    assert found.cluster is None
    assert [row["doc"] for row in found.samples[1]] == ["0", "1", "2"]


def test_a_document_without_a_cluster_is_one_of_its_own():
    rows = [{**row, "cluster": name} for row, name in zip(answers([1] * 5), "a  ba", strict=True)]
    rows = [{**row, "cluster": row["cluster"].strip()} for row in rows]
    cluster = pair("t", baseline=rows).cluster
    assert cluster.tolist() == [0, 1, 2, 3, 0]


def test_what_cannot_be_paired_is_an_error():
    full = answers([1, 0, 1])

    def refuse(before, after, match):
        with pytest.raises(SourceError, match=match):
            pair("t", baseline=before, candidate=after)

    refuse(full, full[:2], "the candidate has no answer to document 2")
    refuse(full[1:], full, "the baseline has no answer to document 0")
    refuse([*full, full[1]], full, "two answers to document 1")
    asked_otherwise = [full[0], {**full[1], "prompt_sha256": "c" * 64}, full[2]]
    refuse(full, asked_otherwise, "asked different prompts for document 1")
    refuse(full[:1], full[:1], "1 document: no interval")
    refuse([], [], "0 documents: no interval")
    nan = [*full[:2], {**full[2], "score": float("nan")}]
    refuse(full, nan, "the candidate's score of document 2 is not a finite number")
    one = [{**row, "cluster": "same"} for row in full]
    refuse(one, one, "belong to the cluster 'same'")
