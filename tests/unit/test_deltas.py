"""Paired differences: perplexity, KL divergence, tasks and gates."""

import numpy as np
import pytest
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

from quantize.errors import SourceError
from quantize.recipe import Margins
from quantize.report import intervals
from quantize.report.deltas import gates, perplexity_delta, task_delta
from quantize.report.divergence import TokenLogprobs, divergence, same_text


def arrays(logits, token=None, document=None, k=8):
    if token is None:
        token, document = questions()
    return TokenLogprobs.of(token_arrays(np.asarray(logits, float), token, document, k))


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
    after = TokenLogprobs(
        document, before.token, before.logprob - lost, before.top_ids, before.top_logprobs
    )
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


def test_interval_covers_the_true_ratio_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    generator = np.random.default_rng(4)
    hits, trials, units = 0, 300, 60
    for _ in range(trials):
        tokens = np.round(generator.lognormal(5, 0.5, units))
        nats = 0.01 * tokens + np.sqrt(tokens) * generator.normal(0, 0.3, units)
        low, high = intervals.ratio_interval(nats, tokens)
        hits += low <= np.exp(0.01) <= high
    # Nominal 95%; the standard deviation of the count is 3.8.
    assert 0.91 <= hits / trials <= 0.985


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
    record = {"text_sha256": "a", "tokens_sha256": "b", "window": 512, "bos": True, "top_k": 8}
    same_text(record, dict(record))
    with pytest.raises(SourceError, match="tokens_sha256 is b for the baseline and c"):
        same_text(record, {**record, "tokens_sha256": "c"})


def test_infinite_log_probability_is_an_error():
    side = arrays(baseline_side().logits)
    broken = side.logprob.copy()
    broken[5] = -np.inf
    with pytest.raises(SourceError, match="scored token 5 the log-probability -inf"):
        TokenLogprobs(side.document, side.token, broken, side.top_ids, side.top_logprobs)


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


def test_divergence_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch):
    sides = arrays(baseline_side().logits), arrays(candidate_side().logits)
    whole = divergence(*sides)
    monkeypatch.setattr("quantize.report.divergence.chunks", lambda total, size: [7] * 34 + [2])
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
    after = TokenLogprobs(
        before.document,
        before.token,
        before.logprob,
        before.top_ids[:, [1, 0, 2]],
        before.top_logprobs[:, [1, 0, 2]],
    )
    found = divergence(before, after)
    assert found["top1_agreement"] == 1
    assert found["maximum"] == 0


# --- tasks


def answers(scores, name="valley_mc"):
    return [sample(name, doc, score) for doc, score in enumerate(scores)]


def delta_of(before, after, **changes):
    task = {**task_record("valley_mc", before), **changes}
    return task_delta(task, answers(before), answers(after))


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


def test_graded_scores_have_a_normal_interval_and_no_mcnemar():
    before, after = [0.5, 0.25, 1.0, 0.75], [0.5, 0.5, 0.75, 0.25]
    delta = delta_of(before, after)
    differences = np.array(after) - np.array(before)
    error = differences.std(ddof=1) / 2
    assert delta["difference_low"] == pytest.approx(differences.mean() - 1.959964 * error)
    assert delta["difference_high"] == pytest.approx(differences.mean() + 1.959964 * error)
    assert (delta["lost"], delta["gained"]) == (2, 1)
    assert "mcnemar_p" not in delta


def test_lost_means_worse_for_a_metric_that_should_be_low():
    delta = delta_of([0.1, 0.2], [0.3, 0.2], higher_is_better=False)
    assert (delta["lost"], delta["gained"]) == (1, 0)
    assert delta["difference"] == pytest.approx(0.1)


def test_answers_are_paired_by_document_not_by_line():
    task = task_record("valley_mc", [1, 0, 1])
    delta = task_delta(task, answers([1, 0, 1]), answers([1, 0, 1])[::-1])
    assert (delta["lost"], delta["gained"]) == (0, 0)


def test_what_cannot_be_paired_is_an_error():
    task, full = task_record("valley_mc", [1, 0, 1]), answers([1, 0, 1])
    with pytest.raises(SourceError, match="candidate has no answer to document 2"):
        task_delta(task, full, full[:2])
    with pytest.raises(SourceError, match="baseline has no answer to document 0"):
        task_delta(task, full[1:], full)
    with pytest.raises(SourceError, match="two answers to document 1"):
        task_delta(task, [*full, full[1]], full)
    asked_otherwise = [full[0], {**full[1], "prompt_sha256": "c" * 64}, full[2]]
    with pytest.raises(SourceError, match="different prompts for document 1"):
        task_delta(task, full, asked_otherwise)
    with pytest.raises(SourceError, match="1 documents: no interval"):
        task_delta(task, full[:1], full[:1])
    with pytest.raises(SourceError, match="not finite"):
        task_delta(task, full, [*full[:2], {**full[2], "score": float("nan")}])


# --- gates


def compared(ratio, *differences, higher_is_better=True):
    tasks = [
        {"name": f"t{i}", "difference": d, "higher_is_better": higher_is_better}
        for i, d in enumerate(differences)
    ]
    return {"perplexity": {"ratio": ratio}, "tasks": tasks}


def test_gates_keep_the_margins():
    margins = Margins(perplexity_ratio=1.05, task_drop=0.02)
    found = gates(margins, compared(1.06, -0.03, -0.02, 0.5))
    assert [(g["name"], g["passed"]) for g in found] == [
        ("perplexity_ratio", False),
        ("task_drop:t0", False),
        ("task_drop:t1", True),
        ("task_drop:t2", True),
    ]
    assert found[1]["value"] == pytest.approx(0.03)
    assert found[1]["limit"] == 0.02


def test_gate_of_a_metric_that_should_be_low():
    found = gates(Margins(task_drop=0.02), compared(1, 0.03, -0.03, higher_is_better=False))
    assert [g["passed"] for g in found] == [False, True]


def test_no_margin_no_gate():
    assert gates(Margins(), compared(9.0, -1.0)) == []
    assert gates(Margins(perplexity_ratio=1.05), {"tasks": []}) == []
