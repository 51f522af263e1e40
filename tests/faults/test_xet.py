"""With hf_xet installed: Xet where the Hub has it and the user says so, LFS otherwise.

In both majors there is no way back to LFS once hf_xet has been asked, so that the pipeline decides
beforehand: Xet on huggingface.co, and where HF_HUB_DISABLE_XET=0 is set.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.bench import SCENARIOS, Bench
from tests.faults.clients import installed_major
from tests.faults.schedules import Planned, Schedule
from tests.faults.trial import run_schedule

MAJORS = [
    pytest.param(major, marks=() if major == installed_major() else (pytest.mark.end_to_end,))
    for major in (1, 2)
]
UPDATE = SCENARIOS["update"]
ABOUT_XET = re.compile(r"/xet-write-token/|/_cas/v1/(xorbs|shards)|/commit/")


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
def test_all_goes_by_xet(major: int, tmp_path: Path) -> None:
    with Bench(major, tmp_path, "0", xet=True) as bench:
        bench.begin("update")
        run = bench.push(bench.second, UPDATE)
        assert run.status == 0, run.result
        repo = bench.repo()
    assert not run.sent()
    assert any("/_cas/v1/xorbs/" in seen.path for seen in run.requests)
    assert repo is not None
    assert bench.second.is_in(repo.tree("main"))


@pytest.mark.end_to_end
@pytest.mark.parametrize("major", [1, 2])
def test_killed_at_every_request_about_xet(major: int, tmp_path: Path) -> None:
    with Bench(major, tmp_path, "0", xet=True) as bench:
        bench.begin("update")
        requests = bench.push(bench.second, UPDATE).requests
        places = [i for i, seen in enumerate(requests) if ABOUT_XET.search(seen.path)]
        assert len(places) >= 4
        for index in places:
            for kind in ("kill-before", "kill-after"):
                run_schedule(bench, Schedule("update", ((Planned(kind, index),),)))


@pytest.mark.parametrize("major", MAJORS)
def test_xet_that_the_hub_does_not_have_is_said(major: int, tmp_path: Path) -> None:
    with Bench(major, tmp_path, "0") as bench:
        run = bench.push(bench.second, SCENARIOS["new"])
        repo = bench.repo()
    assert any("/xet-write-token/" in seen.path for seen in run.requests)
    assert run.status == 2, run.result
    assert "no Xet storage" in run.result["text"]
    assert "unset HF_HUB_DISABLE_XET" in run.result["text"]
    assert repo is not None
    assert set(repo.tree("main")) == {".gitattributes"}
