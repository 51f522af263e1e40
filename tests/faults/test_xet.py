"""Xet and LFS, with hf_xet installed, on a Hub that has LFS alone.

What a Hub with Xet storage does is not tested: there is none to be had on this machine. Both majors
ask it for a token (`xet-write-token`) and leave the rest to hf_xet; there is no way back to LFS
in the client, so that the pipeline decides before: Xet on huggingface.co alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.bench import SCENARIOS, Bench
from tests.faults.clients import installed_major

MAJORS = [
    pytest.param(major, marks=() if major == installed_major() else (pytest.mark.end_to_end,))
    for major in (1, 2)
]
UPDATE = SCENARIOS["update"]


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("disabled", [None, "1"])
def test_all_goes_by_lfs(major: int, disabled: str | None, tmp_path: Path) -> None:
    with Bench(major, tmp_path, disabled) as bench:
        bench.begin("update")
        run = bench.push(bench.second, UPDATE)
        assert run.status == 0, run.result
        assert not any("xet" in seen.path for seen in run.requests)
        assert sum(run.sent().values()) > 100_000


@pytest.mark.parametrize("major", MAJORS)
def test_xet_that_the_hub_does_not_have_is_said(major: int, tmp_path: Path) -> None:
    with Bench(major, tmp_path / "with", "0") as asks_for_xet:
        run = asks_for_xet.push(asks_for_xet.second, SCENARIOS["new"])
        repo = asks_for_xet.repo()
    assert any("/xet-write-token/" in seen.path for seen in run.requests)
    assert run.status == 2, run.result
    assert "no Xet storage" in run.result["text"]
    assert "unset HF_HUB_DISABLE_XET" in run.result["text"]
    assert repo is not None
    assert set(repo.tree("main")) == {".gitattributes"}
