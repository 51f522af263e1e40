"""After the commit: tree, shard headers and random ranges are compared with the local bytes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_fixture import CONTENTS, MESSAGE, TARGET, access, hub_server, online, write_files

from quantize.errors import CredentialsError, ToolError, TransientError
from quantize.hub.push import push
from quantize.hub.readback import RANGE_BYTES, read_range
from tests.hub_server import Fault, HubServer, messages, routes_read
from tests.hub_server.repos import File


def shard(seed: int, elements: int = 300_000) -> bytes:
    """A real safetensors file of one tensor."""
    data = np.random.default_rng(seed).integers(0, 256, elements, dtype=np.uint8).tobytes()
    header = json.dumps({"w": {"dtype": "U8", "shape": [elements], "data_offsets": [0, elements]}})
    return len(header).to_bytes(8, "little") + header.encode() + data


SHARDS = {"1.safetensors": shard(1), "2.safetensors": shard(2), "config.json": b"{}"}


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def ranges(server: HubServer) -> list[tuple[str, int, int]]:
    """(file, first, last) of every range that was asked for, redirects not counted twice."""
    found = []
    for seen in server.seen:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.headers.get("range", ""))
        if asked and "/resolve/" in seen.path:
            found.append((seen.path.rpartition("/")[2], int(asked[1]), int(asked[2])))
    return found


def test_header_and_a_random_range_of_each_shard_are_read(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, SHARDS)
    with hub_server() as server:
        push(access(server), TARGET, entries, paths, MESSAGE)
        asked = ranges(server)
        for name in ("1.safetensors", "2.safetensors"):
            header, random = [(first, last) for file, first, last in asked if file == name]
            length = int.from_bytes(SHARDS[name][:8], "little")
            assert header == (0, 8 + length - 1)
            assert random[1] - random[0] + 1 == RANGE_BYTES
            assert 0 < random[0] < len(SHARDS[name]) - RANGE_BYTES
        server.seen.clear()
        push(access(server), TARGET, entries, paths, MESSAGE)
        assert ranges(server) == asked  # the same commit, the same ranges


@pytest.mark.parametrize("part", ["header", "data"])
def test_bytes_that_differ_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A Hub whose listing is right and whose storage is not."""
    entries, paths = write_files(tmp_path, SHARDS)
    damaged = bytearray(SHARDS["2.safetensors"])
    place = slice(8, 9) if part == "header" else slice(2000, None)
    damaged[place] = bytes(len(damaged[place]))
    whole_or_part = routes_read._whole_or_part

    def from_a_bad_disk(content: bytes, asked: messages.Asked, headers: dict) -> messages.Answer:
        bad = bytes(damaged) if content == SHARDS["2.safetensors"] else content
        return whole_or_part(bad, asked, headers)

    monkeypatch.setattr(routes_read, "_whole_or_part", from_a_bad_disk)
    with (
        hub_server() as server,
        pytest.raises(ToolError, match=r"does not hold what was sent: 2\.safetensors \(bytes"),
    ):
        push(access(server), TARGET, entries, paths, MESSAGE)


def test_a_hub_without_ranges_is_not_downloaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = shard(3, 24 << 20)
    entries, paths = write_files(tmp_path, {"model.safetensors": big})

    def whole(content: bytes, asked: messages.Asked, headers: dict) -> messages.Answer:
        return messages.Answer(content=content, headers=headers)

    monkeypatch.setattr(routes_read, "_whole_or_part", whole)
    with hub_server() as server:
        pushed = push(access(server), TARGET, entries, paths, MESSAGE)
        assert pushed.changed
        assert ["no range requests" in note for note in pushed.notes] == [True]
        commit = pushed.commit
        name = "model.safetensors"
        assert read_range(access(server), TARGET.repo, commit, name, 0, 100) == big[:100]
        assert read_range(access(server), TARGET.repo, commit, name, 5000, 100) is None


def test_failures_pass_when_they_end_in_time(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, SHARDS)
    faults = [Fault("GET .*/_cdn/", status=503), Fault("GET .*/_cdn/", skip=2, cut="answer")]
    with hub_server(*faults) as server:
        assert push(access(server), TARGET, entries, paths, MESSAGE).changed
        assert [fault.times for fault in server.faults] == [0, 0]


def test_after_a_failure_the_next_call_reads_back_and_sends_nothing(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, SHARDS)
    with hub_server(Fault("GET .*/_cdn/", times=99, status=500)) as server:
        with pytest.raises(TransientError, match=r"reading 1\.safetensors of ann/tiny-awq back"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        server.faults.clear()
        server.seen.clear()
        assert not push(access(server), TARGET, entries, paths, MESSAGE).changed
        assert len(ranges(server)) == 4
        assert server.count("^(PUT|POST) ") == 0


def test_a_token_that_expires_meanwhile_is_named_as_such(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, CONTENTS)
    with hub_server(Fault("POST .*/commit/", expire_token=True)) as server:
        with pytest.raises(CredentialsError, match="expired or revoked"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        server.hub.expired.clear()
        assert push(access(server), TARGET, entries, paths, MESSAGE).changed


def test_visibility_that_is_not_the_recipes_is_said(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, CONTENTS)
    with hub_server() as server:
        repo = server.hub.create("model", TARGET.repo, private=False)
        repo.commit("main", {"LICENSE": File(b"MIT", lfs=False)}, "by the Hub")
        pushed = push(access(server), TARGET, entries, paths, MESSAGE)
        assert "is public, the recipe says private: true" in pushed.notes[0]
        asked = replace(TARGET, private=False)
        assert push(access(server), asked, entries, paths, MESSAGE).notes == ()
