"""A seeded sample of the kills and of the full, failing and slow disks; `make faults` runs all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.disks import failing, full
from tests.faults.kills import points
from tests.faults.kills.bench import Bench
from tests.faults.kills.campaign import campaign

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]  # minutes on a busy machine

KILLS = {"fetch": 3, "calibrate": 1, "compress": 1, "audit": 2, "card": 2, "publish": 3}
SEED = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if reason := points.why_not():
        pytest.skip(reason)
    bench = Bench(tmp_path_factory.mktemp("bench"), measured=False)
    bench.prepare()
    yield bench


def test_a_sample_of_kills(bench: Bench) -> None:
    said: list[str] = []
    tallies = campaign(bench, KILLS, SEED, said.append)
    assert [tally.broken for tally in tallies] == [[] for _ in KILLS], said
    assert sum(tally.kills for tally in tallies) >= sum(KILLS.values()) - 2
    assert max(tally.lost_layers for tally in tallies) <= 1


@pytest.mark.parametrize(
    "name", ["read of an input", "sync of the result", "mkdir EROFS", "open EMFILE"]
)
def test_a_disk_that_fails(name: str, bench: Bench) -> None:
    said: list[str] = []
    assert failing.campaign(bench, said.append, name) == 0, said
    assert said


def test_a_full_disk_costs_nothing_that_is_finished(bench: Bench) -> None:
    if reason := full.why_not():
        pytest.skip(reason)
    most = 3 * sum(artifact.manifest.total_bytes for artifact in bench.clean.artifacts())
    disk = full.FullDisk(bench)
    small = disk.run(most // 6)
    assert small.code == 4
    assert set(small.done) >= {"fetch", "calibrate"}
    assert "publish" not in small.done
    assert "bytes free" in disk.preflight(100 << 20)
