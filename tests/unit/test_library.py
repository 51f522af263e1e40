"""Held-out text through a library: files between core and worker, and what is compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize.errors import ToolError
from quantize.measure.library import BEGINNINGS, chosen, common, read, write
from quantize.measure.perplexity import Window

WINDOWS = [Window(0, (1, 5, 6)), Window(0, (1, 7)), Window(2, (1, 8, 9, 10))]


def scores(folder: Path, **changed: float) -> Path:
    """As the worker writes them: a row for each token of each window but the first."""
    logprobs = np.arange(-1, -7, -1, dtype=np.float32)
    logprobs[0] = changed.get("first", -1.0)
    ids = np.stack([np.arange(6), np.full(6, -1)], axis=1).astype(np.int32)  # of two, one is there
    best = np.stack([np.full(6, -0.5), np.full(6, -np.inf)], axis=1).astype(np.float32)
    path = folder / "scores.npz"
    np.savez(path, logprobs=logprobs, top_ids=ids, top_logprobs=best)
    return path


def test_windows_as_the_worker_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "windows.npz", WINDOWS)
    stored = np.load(tmp_path / "windows.npz")
    assert stored["tokens"].tolist() == [1, 5, 6, 1, 7, 1, 8, 9, 10]
    assert stored["tokens"].dtype == np.int32
    assert stored["offsets"].tolist() == [0, 3, 5, 9]


def test_scores_come_back_by_window(tmp_path: Path) -> None:
    found = list(read(scores(tmp_path), WINDOWS))
    assert [prompt.logprobs for prompt in found] == [[-1, -2], [-3], [-4, -5, -6]]
    assert found[2].top == [[(3, -0.5)], [(4, -0.5)], [(5, -0.5)]]  # without what fills up


def test_an_impossible_token(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="a probability of zero"):
        list(read(scores(tmp_path, first=-np.inf), WINDOWS))


def test_beginnings_are_spread_over_the_text() -> None:
    windows = [Window(number, (1, *range(100))) for number in range(80)]
    found = chosen(windows)
    assert len(found) == BEGINNINGS
    assert all(len(ids) == 32 for ids in found)
    assert chosen(windows[:3]) == [list(windows[0].tokens[:32])] * 3


def test_what_two_continuations_have_in_common() -> None:
    assert common([1, 2, 3], [1, 2, 3]) == 3
    assert common([1, 2, 3], [1, 9, 3]) == 1  # what follows has another beginning
    assert common([1], [1, 2]) == 1
    assert common([], [1]) == 0
