"""The fault schedules on both majors of huggingface_hub, and that a broken push would show."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.faults.bench import REPO, SCENARIOS, Bench, Run
from tests.faults.campaign import Part, run_campaign
from tests.faults.clients import installed_major
from tests.faults.leaks import leaks
from tests.faults.schedules import Planned, Schedule
from tests.faults.trial import Broken, Trial, run_schedule
from tests.hub_server import Seen
from tests.hub_server.repos import File, Repo

PART = Part(every=15, pairs=4)
"""The kills at every request of two scenarios, a part of the others: over 300 schedules."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(installed_major(), tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.mark.end_to_end
@pytest.mark.timeout(3600)  # minutes, or many on a busy machine
@pytest.mark.parametrize("major", [1, 2])
def test_main_is_the_old_version_or_the_new_one(major: int, tmp_path: Path) -> None:
    outcome = run_campaign(major, tmp_path, PART)
    assert outcome.broken == []
    assert outcome.schedules >= 200
    assert outcome.kills >= 100


@pytest.mark.parametrize("kind", ["kill-before", "kill-after", "drop-after", "late", "moved"])
@pytest.mark.parametrize("request_of", ["/commit/", "/verify", "/tree/"])
def test_the_requests_that_matter_most(bench: Bench, kind: str, request_of: str) -> None:
    bench.begin("update")
    happy = bench.push(bench.second, SCENARIOS["update"]).requests
    index = max(number for number, seen in enumerate(happy) if request_of in seen.path)
    run_schedule(bench, Schedule("update", ((Planned(kind, index),),)))


def trial(bench: Bench, scenario: str = "update") -> tuple[Trial, Repo]:
    bench.begin(scenario)
    repo = bench.repo()
    assert repo is not None
    return Trial(bench, Schedule(scenario, ())), repo


def second(bench: Bench) -> dict[str, File]:
    folder = bench.second.folder
    return {name: File((folder / name).read_bytes(), lfs=False) for name in bench.second.sha256}


def test_half_a_version_would_be_noticed(bench: Bench) -> None:
    watched, repo = trial(bench)
    watched.watch("the start")
    assert watched.problem == ""
    repo.commit("main", second(bench), "all of it")
    watched.watch("one commit")
    assert watched.problem == ""
    some = second(bench)
    del some["config.json"]
    repo.commit("main", some, "half of it")
    watched.watch("POST /commit")
    assert watched.problem == "main is no whole version after POST /commit"


def test_what_is_left_over_would_be_noticed(bench: Bench) -> None:
    watched, repo = trial(bench)
    repo.commit("main", {**second(bench), "merges.txt": File(b"gone", lfs=False)}, "too much")
    watched.watch("x")
    assert watched.problem


def test_a_second_commit_would_be_noticed(bench: Bench) -> None:
    watched, repo = trial(bench)
    for _ in range(2):
        repo.commit("main", second(bench), "Publish model")
    with pytest.raises(Broken, match="2 commits instead of one"):
        watched.check_result()


def test_main_that_moves_under_a_pull_request_would_be_noticed(bench: Bench) -> None:
    watched, repo = trial(bench, "pull-request")
    repo.commit("main", second(bench), "Publish model")
    watched.watch("x")
    assert "main" in watched.problem


def test_bytes_that_are_sent_again_would_be_noticed(bench: Bench) -> None:
    watched, repo = trial(bench)
    sha, content = next(iter(repo.objects.items()))
    put = Seen("PUT", f"/_lfs/{REPO}/{sha}", len(content))
    watched.check_bytes((), Run(0, {}, (put,)))
    with pytest.raises(Broken, match="bytes for an object"):
        watched.check_bytes((), Run(0, {}, (put, put)))
    watched.complete = frozenset({sha})
    with pytest.raises(Broken, match="is sent again"):
        watched.check_bytes((), Run(0, {}, (put,)))


def test_a_run_that_lies_would_be_noticed(bench: Bench) -> None:
    watched, _ = trial(bench)
    with pytest.raises(Broken, match="it says that it is done"):
        watched.check_end((), Run(0, {"code": 0}, ()))
    with pytest.raises(Broken, match="ended with 1"):
        watched.check_end((Planned("500", 0),), Run(1, {"text": "a bug"}, ()))


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
def test_a_secret_is_found_however_it_is_written(before: str) -> None:
    secret = 'hf_+/ü"='
    text = f"{before}{secret} and more"
    assert leaks(text.encode(), secret)
    assert leaks(quote(text, safe="").encode(), secret)
    assert leaks(base64.b64encode(text.encode()), secret)
    assert leaks(base64.urlsafe_b64encode(f"{before}{secret}".encode()), secret)
    assert not leaks(f"{before}{secret[:-2]}".encode(), secret)
    assert not leaks(base64.b64encode(f"{before}{secret[:-2]}".encode()), secret)
