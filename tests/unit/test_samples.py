"""lm-eval's samples as lines: what was asked, what came back, and what it is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.protocol import WorkerError
from quantize.workers.samples import collect, standard_error


def body(folder: Path, **keys: Any) -> dict[str, Any]:
    given = {"task": "t", "metric": "acc", "filter": "none", "cluster": None}
    return given | {"samples": str(folder / "t.jsonl")} | keys


def generated(number: int, score: float, text: str = "four", **document: Any) -> dict[str, Any]:
    """As lm-eval 0.4.13 logs a document of a generation task."""
    return {
        "doc_id": number,
        "doc": {"question": "two and two?", **document},
        "target": "four",
        "arguments": [("Q: two and two?\nA:", {"until": ["\n"], "max_gen_toks": 8})],
        "resps": [[text]],
        "filtered_resps": [text.strip()],
        "filter": "none",
        "metrics": ["acc"],
        "acc": score,
    }


def chosen(number: int, score: float) -> dict[str, Any]:
    return generated(number, score) | {
        "target": "1",
        "arguments": [("Q: two and two?\nA:", " three"), ("Q: two and two?\nA:", " four")],
        "resps": [[(-3.5, False)], [(-0.25, True)]],
        "filtered_resps": [(-3.5, False), (-0.25, True)],
    }


def results(*samples: dict[str, Any], **tasks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"samples": tasks or {"t": list(samples)}, "versions": {"t": 2.0}}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]


def test_a_generated_answer(tmp_path: Path) -> None:
    figures = collect(body(tmp_path), [results(generated(0, 1.0), generated(1, 0.0, "five"))])
    first, second = lines(tmp_path)
    assert first["prompt"] == "Q: two and two?\nA:"
    assert (first["doc"], first["group"], first["cluster"]) == ("0", "", "")
    assert (first["target"], first["response"], second["response"]) == ("four", "four", "five")
    assert (first["score"], first["scores"]) == (1.0, [1.0])
    assert (figures["score"], figures["documents"], figures["repeats"]) == (0.5, 2, 1)
    assert figures["version"] == "2.0"
    assert "clusters" not in figures


def test_what_a_filter_took_out_stands_apart(tmp_path: Path) -> None:
    sample = generated(0, 1.0, "two and two make 4.") | {"filtered_resps": ["4"]}
    collect(body(tmp_path), [results(sample)])
    assert lines(tmp_path)[0]["response"] == "two and two make 4.\n\n[none] 4"


def test_a_choice_shows_all_of_them(tmp_path: Path) -> None:
    collect(body(tmp_path), [results(chosen(0, 1.0), chosen(1, 1.0))])
    first = lines(tmp_path)[0]
    assert first["prompt"] == "Q: two and two?\nA:"  # once
    assert first["response"] == "  -3.500  three\n> -0.250  four"


def test_the_prompt_is_hashed_with_all_that_is_asked(tmp_path: Path) -> None:
    def sha(sample: dict[str, Any]) -> tuple[str, str]:
        figures = collect(body(tmp_path), [results(sample)])
        return lines(tmp_path)[0]["prompt_sha256"], figures["prompts_sha256"]

    sample = chosen(0, 1.0)
    other = sample | {"arguments": [*sample["arguments"][:1], ("Q: two and two?\nA:", " 4")]}
    assert sha(sample) == sha(sample | {"resps": [[(-1.0, True)], [(-2.0, False)]]})
    assert sha(sample)[0] != sha(other)[0]
    assert sha(sample)[1] != sha(other)[1]


def test_repeats_are_averaged(tmp_path: Path) -> None:
    scores = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    repeats = [results(generated(0, a), generated(1, b, "five")) for a, b in scores]
    figures = collect(body(tmp_path), repeats)
    first, second = lines(tmp_path)
    assert (first["scores"], first["score"]) == ([1.0, 1.0, 0.0, 1.0], 0.75)
    assert (second["scores"], second["score"]) == ([0.0, 1.0, 0.0, 0.0], 0.25)
    assert (figures["score"], figures["repeats"], figures["documents"]) == (0.5, 4, 2)
    assert figures["standard_error"] == pytest.approx(0.25)  # of two documents, not eight


def test_subtasks_are_clusters(tmp_path: Path) -> None:
    tasks = {"t_b": [generated(0, 1.0), generated(1, 0.0)], "t_a": [generated(0, 1.0)]}
    figures = collect(body(tmp_path), [results(**tasks)])
    assert [(row["doc"], row["cluster"]) for row in lines(tmp_path)] == [
        ("t_a/0", "t_a"),
        ("t_b/0", "t_b"),
        ("t_b/1", "t_b"),
    ]
    assert figures["clusters"] == 2


def test_a_field_names_the_cluster(tmp_path: Path) -> None:
    samples = [generated(n, 1.0, passage=n // 2, id=f"d{n}") for n in range(4)]
    figures = collect(body(tmp_path, cluster="passage"), [results(*samples)])
    assert [row["cluster"] for row in lines(tmp_path)] == ["0", "0", "1", "1"]
    assert figures["clusters"] == 2
    with pytest.raises(WorkerError, match="task t, document d0: it has no field 'pasage'"):
        collect(body(tmp_path, cluster="pasage"), [results(*samples)])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"acc": math.nan}, "ToolError", "task t, document d1: acc is nan"),
        ({"acc": None}, "SourceError", "task t, document d1: acc is None, not one number"),
        ({"acc": (-3.0, 5)}, "SourceError", "document d1: acc is .*, not one number"),
        ({"resps": [[]]}, "ToolError", "task t, document d1: the server gave no answer"),
        ({"resps": [[None]]}, "ToolError", "task t, document d1: the server gave no answer"),
        ({"resps": []}, "ToolError", "task t, document d1: the server gave no answer"),
    ],
)
def test_a_document_that_cannot_be_scored_is_named(
    change: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    samples = [generated(0, 1.0), generated(1, 1.0, id="d1") | change]
    with pytest.raises(WorkerError, match=message) as caught:
        collect(body(tmp_path), [results(*samples)])
    assert caught.value.kind == kind
    assert not (tmp_path / "t.jsonl").exists()


def test_a_metric_or_filter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="reports no metric 'f1'") as caught:
        collect(body(tmp_path, metric="f1"), [results(generated(0, 1.0))])
    assert "['acc']" in caught.value.hint
    with pytest.raises(WorkerError, match="has no filter 'strict'") as caught:
        collect(body(tmp_path, filter="strict"), [results(generated(0, 1.0))])
    assert "['none']" in caught.value.hint


# --- standard error ---------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=30))
def test_without_clusters_it_is_the_usual_one(scores: list[float]) -> None:
    usual = np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert standard_error(scores, [""] * len(scores)) == pytest.approx(usual, abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12), st.integers(1, 5))
def test_copies_in_a_cluster_tell_nothing_new(scores: list[float], copies: int) -> None:
    names = [f"c{number}" for number in range(len(scores))]
    alone = standard_error(scores, names)
    assert standard_error(scores * copies, names * copies) == pytest.approx(alone, abs=1e-12)
