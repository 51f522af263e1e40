"""Perplexity of held-out text, against a model whose every probability is known."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_server import ALPHABET, BOS, VOCABULARY, Model, serving

from quantize.errors import SourceError, ToolError, TransientError
from quantize.keys import file_sha256
from quantize.measure.client import Client, VllmClient
from quantize.measure.perplexity import cut, measure, read_documents, through
from quantize.records import Perplexity
from quantize.suite import PerplexityText

DOCUMENTS = ["the heron stands in the shallow water.", "a", "zebras, quizzes and jazz."]


@pytest.fixture(scope="module", params=["bos", "bos and eos", "neither"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Client]]:
    """A tokenizer of each kind: what it adds around a text."""
    model = Model(bos=request.param != "neither", eos=request.param == "bos and eos")
    with serving(model) as url:
        client = VllmClient(url, "model")
        yield model, client
        client.close()


def text_file(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def scored_tokens(model: Model, documents: list[str], window: int) -> list[list[int]]:
    """By definition: windows of a document do not overlap; BOS, or the first token, is context."""
    step = window - model.bos
    scored = []
    for document in documents:
        ids = model.encode(document, special=False)
        pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
        scored += [piece if model.bos else piece[1:] for piece in pieces]
    return [piece for piece in scored if piece]


def run(
    client: Client,
    folder: Path,
    documents: list[str] = DOCUMENTS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    concurrency: int = 4,
    **text: object,
) -> Perplexity:
    given = PerplexityText(text="text.jsonl", **text)  # type: ignore[arg-type]
    path = text_file(folder, documents)
    score = through(client, concurrency)
    return measure(client, given, path, folder / "out.npz", score, on_progress)


def test_perplexity_of_a_known_model(server: tuple[Model, Client], tmp_path: Path) -> None:
    model, client = server
    progress: list[tuple[int, int]] = []
    record = run(client, tmp_path, on_progress=lambda *x: progress.append(x), window=8, top_k=5)
    windows = scored_tokens(model, DOCUMENTS, 8)
    tokens = [token for window in windows for token in window]
    assert record["perplexity"] == pytest.approx(model.perplexity(tokens), rel=1e-12)
    assert record["scored_tokens"] == len(tokens)
    assert record["total_nats"] == pytest.approx(-sum(model.logprobs[t] for t in tokens))
    assert (record["windows"], record["window"], record["top_k"]) == (len(windows), 8, 5)
    assert record["documents"] == (3 if model.bos else 2)  # a lone token is context only
    assert record["bos"] == model.bos
    assert (record["text"], record["text_sha256"]) == (
        "text.jsonl",
        file_sha256(tmp_path / "text.jsonl"),
    )
    assert progress == [(done, len(windows)) for done in range(1, len(windows) + 1)]


def test_values_per_token_are_kept(server: tuple[Model, Client], tmp_path: Path) -> None:
    model, client = server
    run(client, tmp_path, window=8, top_k=VOCABULARY + 2)  # more than there are
    windows = [scored_tokens(model, [document], 8) for document in DOCUMENTS]
    tokens = [token for document in windows for window in document for token in window]
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["token"].tolist() == tokens
        assert arrays["token"].dtype == arrays["document"].dtype == np.int32
        counts = [sum(map(len, document)) for document in windows]
        assert arrays["document"].tolist() == np.repeat(range(3), counts).tolist()
        expected = np.asarray([model.logprobs[token] for token in tokens], np.float32)
        assert arrays["logprob"].dtype == np.float32
        np.testing.assert_array_equal(arrays["logprob"], expected)
        assert arrays["top_ids"].shape == (len(tokens), VOCABULARY + 2)
        assert arrays["top_ids"][:, :VOCABULARY].tolist() == [list(range(VOCABULARY))] * len(tokens)
        assert (arrays["top_ids"][:, VOCABULARY:] == -1).all()
        assert np.isneginf(arrays["top_logprobs"][:, VOCABULARY:]).all()
        total = np.exp(arrays["top_logprobs"].astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.text(ALPHABET, max_size=30), min_size=1, max_size=4),
    window=st.integers(2, 12),
    limit=st.none() | st.integers(1, 6),
)
def test_windows_cover_the_text_once_and_in_order(
    server: tuple[Model, Client], documents: list[str], window: int, limit: int | None
) -> None:
    model, client = server
    expected = scored_tokens(model, documents, window)
    text = PerplexityText(text="t.jsonl", window=window, windows=limit)
    if not expected:
        with pytest.raises(SourceError, match="no tokens"):
            cut(client, documents, text)
        return
    windows, bos = cut(client, documents, text)
    assert bos == (BOS,) * model.bos
    assert all(len(piece.tokens) <= window for piece in windows)
    assert all(piece.tokens[0] == BOS for piece in windows) or not model.bos
    assert [list(piece.tokens[1:]) for piece in windows] == expected[:limit]
    numbers = [piece.document for piece in windows]
    assert numbers == sorted(numbers)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.text(ALPHABET, max_size=40), min_size=1, max_size=3),
    window=st.integers(2, 12),
    stride=st.integers(1, 12),
)
def test_a_stride_scores_every_token_once_with_the_most_context(
    server: tuple[Model, Client], documents: list[str], window: int, stride: int
) -> None:
    model, client = server
    text = PerplexityText(text="t.jsonl", window=window, stride=min(stride, window))
    ids = [model.encode(document, special=False) for document in documents]
    overlap = min(stride, window) < window - model.bos
    if not any(len(tokens) > (not model.bos) for tokens in ids):
        with pytest.raises(SourceError, match="no tokens"):
            cut(client, documents, text)
        return
    windows, _ = cut(client, documents, text)
    for number, tokens in enumerate(ids):
        own = [piece for piece in windows if piece.document == number]
        scored = [token for piece in own for token in piece.tokens[piece.first :]]
        if model.bos:
            assert scored == tokens
        elif overlap:  # without BOS the document's first token has no context at all
            assert scored == tokens[1:]
        # Each token: no window that begins a stride earlier could have held it.
        for before, after in itertools.pairwise(own):
            assert len(before.tokens) == window
            assert len(after.tokens) - after.first <= stride
    assert all(len(piece.tokens) <= window for piece in windows)


def test_positions_and_the_protocol_are_kept(client: Client, model: Model, tmp_path: Path) -> None:
    record = run(client, tmp_path, ["abcdefghij"], window=6, stride=3, top_k=2)
    # BOS and abcde; BOS and defgh, of which fgh are new; BOS and ghij, of which ij are new
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["position"].tolist() == [1, 2, 3, 4, 5, 3, 4, 5, 3, 4]
        assert arrays["position"].dtype == np.int32
        assert len(arrays["top_ids"]) == len(arrays["token"]) == 10
    assert record["perplexity"] == pytest.approx(
        model.perplexity(model.encode("abcdefghij", special=False)), rel=1e-12
    )
    assert (record["stride"], record["joined"], record["bos"]) == (3, False, True)
    assert record["excluded"] == "nothing but BOS, which begins each window"
    assert run(client, tmp_path, window=6)["stride"] == 5  # no overlap


def literature(model: Model, documents: list[str], window: int) -> float:
    """GPTQ's and AWQ's evaluation, written down from their scripts."""
    ids = model.encode("\n\n".join(documents), special=True)
    nats = []
    for number in range(len(ids) // window):
        labels = ids[number * window : (number + 1) * window][1:]
        mean = -math.fsum(model.logprobs[token] for token in labels) / len(labels)
        nats.append(mean * window)
    return math.exp(math.fsum(nats) / (len(nats) * window))


def test_the_literatures_protocol(server: tuple[Model, Client], tmp_path: Path) -> None:
    model, client = server
    if model.eos:  # no tokenizer of the literature's models adds an end
        return
    documents = [*DOCUMENTS, "", "", *DOCUMENTS]
    record = run(client, tmp_path, documents, join=True, bos="once", window=10)
    assert record["perplexity"] == pytest.approx(literature(model, documents, 10), rel=1e-12)
    assert record["scored_tokens"] == record["windows"] * 9
    assert "what is left after the last whole window" in record["excluded"]
    assert (record["joined"], record["bos"], record["stride"]) == (True, model.bos, 10)


def test_rows_are_joined_on_demand(client: Client, model: Model, tmp_path: Path) -> None:
    record = run(client, tmp_path, join=True, window=64)
    (joined,) = scored_tokens(model, ["\n\n".join(DOCUMENTS)], 2 + sum(map(len, DOCUMENTS)) + 4)
    assert record["scored_tokens"] == len(joined)
    assert record["documents"] == 1
    assert record["perplexity"] == pytest.approx(model.perplexity(joined), rel=1e-12)


def test_equal_tokens_have_one_digest(client: Client, tmp_path: Path) -> None:
    digests = {run(client, tmp_path, window=8)["tokens_sha256"] for _ in range(2)}
    assert len(digests) == 1
    assert run(client, tmp_path, window=9)["tokens_sha256"] not in digests
    assert run(client, tmp_path, [*DOCUMENTS, "more"], window=8)["tokens_sha256"] not in digests


def test_a_limit_spares_the_rest_of_the_text(client: Client, model: Model, tmp_path: Path) -> None:
    documents = ["some words"] * 50
    assert run(client, tmp_path, documents, window=6, windows=3)["windows"] == 3
    asked = [body["prompt"] for path, body in model.requests if path == "/tokenize"]
    assert len(asked) == 2 + 2  # what a text is given, and two documents of two windows each


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("nan", ToolError, "not numbers"),
        ("null", ToolError, "not numbers"),
        ("impossible", ToolError, "probability of zero"),
        ("hopeless", ToolError, "costs 5000 nats a token"),
    ],
)
def test_a_broken_model_has_no_perplexity(
    fault: str, error: type[Exception], message: str, client: Client, model: Model, tmp_path: Path
) -> None:
    model.fault = fault
    with pytest.raises(error, match=message):
        run(client, tmp_path)


def test_a_server_that_breaks_off_is_not_asked_for_the_rest(
    client: Client, model: Model, tmp_path: Path
) -> None:
    def break_off(done: int, total: int) -> None:
        model.fault = "drop"

    with pytest.raises(TransientError):
        run(client, tmp_path, ["abcdefgh"] * 300, break_off, concurrency=1, window=9)
    assert not (tmp_path / "out.npz").exists()


def test_an_interrupt_is_not_answered_by_scoring_the_rest(
    client: Client, model: Model, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(client, tmp_path, ["abcdefgh"] * 300, interrupt, concurrency=1, window=9)
    asked = [path for path, _ in model.requests if path == "/v1/completions"]
    assert len(asked) < 150


def test_no_text(client: Client, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tokens"):
        run(client, tmp_path, ["", ""])


# --- files ------------------------------------------------------------------------------------


def test_documents_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # legal inside a JSON string, and taken for the end of a line by Unicode's rules
    separators = "one\u2028two\u2029three\u0085four"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in (separators, "ü", "")]
    path.write_text("\n" + "\r\n\n".join(rows) + "\n\n", encoding="utf-8")
    assert read_documents(path, "text") == [separators, "ü", ""]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": 1}\nmore\n')
    assert read_documents(path, "text") == ['{"text": 1}\nmore\n']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain", "a.jsonl:3: not an object with `text`"),
        (b'{"txt": "a"}', "a.jsonl:3: not an object with `text`"),
        (b'["text"]', "a.jsonl:3: not an object with `text`"),
        (b'"text"', "a.jsonl:3: not an object with `text`"),
        (b'{"text": "\xff"}', "a.jsonl:3: not an object with `text`"),
        (b'{"text": null}', "a.jsonl:3: `text` is null, not a text"),
        (b'{"text": ["a"]}', r"a.jsonl:3: `text` is \[\"a\"\], not a text"),
    ],
)
def test_a_row_without_text_is_an_error_with_its_line(
    line: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(SourceError, match=message):
        read_documents(path, "text")


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match="not UTF-8"):
        read_documents(path, "text")


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_is_read_back(documents: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
        path.write_text("\n".join(lines), encoding="utf-8")
        assert read_documents(path, "text") == documents


def test_the_known_model_is_a_distribution() -> None:
    assert math.fsum(map(math.exp, Model().logprobs)) == pytest.approx(1)
