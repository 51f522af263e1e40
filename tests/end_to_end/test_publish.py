"""One real `quantize run` that publishes to a folder, to a loopback Hub and to a loopback S3.

Afterwards everything that it wrote, printed and sent is searched for its secrets and for the names
of this machine: see :data:`PATHS_ALLOWED` for the local files that may name a folder.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantize.environments import cache_folder
from tests.end_to_end.conftest import ROOT, Finished, Work
from tests.hub_server import Account, Hub, HubServer
from tests.leaks import files, found
from tests.s3_server import BUCKET, KEY_ID, SECRET, S3Server, credentials, s3_server

pytestmark = pytest.mark.end_to_end

TOKEN = "hf_canaryEndToEnd"
RECIPE = "tiny-llama-fp8"
REPO = "tester/tiny-fp8"
SOURCE = ROOT / "examples" / "tiny_llama" / "instruct"
TARGETS = (
    "publish.folder=out/three-targets",
    f"publish.hub={{repo: {REPO}}}",
    f"publish.url=s3://{BUCKET}/acme/tiny-fp8",
    f"model.source={SOURCE}",  # a path of this machine, as a user's recipe has it
)
PATHS_ALLOWED = re.compile(
    r"\.runs/"  # logs, requests of workers, result.json: for whoever ran it
    r"|fetch/[0-9a-f]+/source\.json$"  # where the local checkpoint lies
    r"|publish/[0-9a-f]+/receipt\.json$"  # which folder was published to
    r"|(card|publish)/[0-9a-f]+/manifest\.json$"  # their keys: the recipe as it was written
)
"""Files of the store that may name a folder of this machine; no secret may stand anywhere."""


@dataclass(frozen=True)
class Published:
    """The run, the same command once more, `verify`, and the servers with all they were sent."""

    work: Work
    home: Path
    began: float
    first: Finished
    again: Finished
    verified: tuple[Finished, ...]  # `quantize verify` of repository, bucket and folder
    first_writes: tuple[int, int]  # commits on the Hub, writes to S3
    hub: HubServer
    s3: S3Server

    @property
    def result(self) -> dict[str, Any]:
        return self.first.json()

    @property
    def folder(self) -> Path:
        return self.work.folder / "out" / "three-targets"

    def contents(self) -> dict[str, bytes]:
        """The published folder."""
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file()
        }

    def store_files(self) -> Iterator[tuple[str, bytes]]:
        """All artifacts of this run and what it left beside them."""
        store = self.work.store
        for stage in self.result["stages"]:
            kind = stage["id"].partition("-")[0]
            yield from files(store / kind / stage["key"])
        for folder in (store / ".runs", *store.glob("*/.staging"), store / ".locks"):
            yield from files(folder, since=self.began)

    @property
    def runs(self) -> tuple[Finished, ...]:
        return self.first, self.again, *self.verified

    def writes(self) -> tuple[int, int]:
        return _writes(self.hub, self.s3)


def _writes(hub: HubServer, s3: S3Server) -> tuple[int, int]:
    return hub.count("POST .*/commit/"), s3.count("PUT|POST|DELETE")


@pytest.fixture(scope="module")
def published(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    home = tmp_path_factory.mktemp("home-of-nobody")
    hub_server = HubServer(Hub({TOKEN: Account("tester")}), keep_bodies=True)
    with hub_server as hub, s3_server() as s3:
        env = {
            **credentials(s3),
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home / "huggingface"),
        }
        arguments = ["run", RECIPE, "--store", str(work.store), "--json"]
        arguments += [word for target in TARGETS for word in ("--set", target)]
        began = time.time() - 1
        first = work.quantize(*arguments, env=env)
        assert first.code == 0, first.err + first.out
        writes = _writes(hub, s3)
        again = work.quantize(*arguments, env=env)
        assert again.code == 0, again.err + again.out
        places = (REPO, f"s3://{BUCKET}/acme/tiny-fp8", "out/three-targets")
        verified = tuple(work.quantize("verify", place, env=env) for place in places)
        yield Published(work, home, began, first, again, verified, writes, hub, s3)


def test_three_targets_hold_the_same_whole_publish(published: Published) -> None:
    contents = published.contents()
    artifact = Path(published.result["places"]["artifact"])
    shards = sorted(artifact.glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert contents[shard.name] == shard.read_bytes()
    assert {"README.md", "config.json", "tokenizer.model", "quantize/record.json"} <= set(contents)
    listed = json.loads(contents["quantize/manifest.json"])["files"]
    assert {entry["name"]: entry["sha256"] for entry in listed} == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        if name != "quantize/manifest.json"
    }
    assert published.s3.contents("acme/tiny-fp8/") == contents
    tree = published.hub.hub.repos["model", REPO].tree("main")
    on_the_hub = {name: file.sha256 for name, file in tree.items() if name != ".gitattributes"}
    assert on_the_hub == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
    assert published.first_writes[0] == 1


def test_the_same_command_again_writes_nothing(published: Published) -> None:
    assert {stage["state"] for stage in published.again.json()["stages"]} == {"hit"}
    assert published.writes() == published.first_writes


def test_each_target_verifies(published: Published) -> None:
    for verified in published.verified:
        assert verified.code == 0, verified.out + verified.err
        assert verified.out.splitlines()[-1].strip() == "verified"


def secrets() -> dict[str, str]:
    return {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": SECRET}


def names_of_the_machine(published: Published) -> dict[str, str]:
    """What identifies this machine and its user; short words, such as root, stand everywhere."""
    found = {
        "the working directory": str(published.work.folder),
        "the home folder of the Hub's client": str(published.home),
        "the checkout": str(ROOT),
        "the cache": str(cache_folder()),
        "the home folder": str(Path.home()),
        "the host": socket.gethostname(),
        "the user": getpass.getuser(),
    }
    return {what: name for what, name in found.items() if len(name) > 4 and name != "root"}


def test_no_secret_is_written_printed_or_sent(published: Published) -> None:
    searched = [
        *published.store_files(),
        *files(published.folder),
        *files(cache_folder(), since=published.began),
        *files(published.home),
        *(("output", run.out.encode()) for run in published.runs),
        *(("errors", run.err.encode()) for run in published.runs),
        *(("to the Hub", seen.searchable()) for seen in published.hub.seen),
        *(("to S3", request) for request in published.s3.sent),
        *(("S3's Authorization", text.encode()) for text in published.s3.authorizations),
    ]
    assert {"output", "errors", "to the Hub", "to S3"} <= {where for where, _ in searched}
    assert any("publish/" in where for where, _ in searched)
    assert found(searched, secrets()) == set()
    key_id = [text for text in searched if text[0] != "S3's Authorization"]
    assert found(key_id, {"AWS_ACCESS_KEY_ID": KEY_ID}) == set()


def test_nothing_that_leaves_names_the_machine(published: Published) -> None:
    leaves = [
        *files(published.folder),
        *(("to the Hub", seen.searchable()) for seen in published.hub.seen),
        *(("to S3", request) for request in published.s3.sent),
    ]
    leaves = [(where.removeprefix(str(published.folder)), text) for where, text in leaves]
    assert found(leaves, names_of_the_machine(published)) == set()


def test_paths_stay_where_they_are_documented(published: Published) -> None:
    store = f"{published.work.store}/"
    searched = [
        (where, text)
        for where, text in published.store_files()
        if not PATHS_ALLOWED.match(where.removeprefix(store))
    ]
    assert searched
    assert found(searched, names_of_the_machine(published)) == set()


def test_without_a_token_nothing_is_started(work: Work, tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")}
    store = tmp_path / "store"
    target = ("--set", f"publish.hub={{repo: {REPO}}}", "--set", "publish.folder=null")
    done = work.quantize("run", RECIPE, "--store", str(store), *target, env=env)
    assert done.code == 5, done.err
    assert "HF_TOKEN" in done.err
    assert not list(store.glob("*/*/manifest.json"))


def test_without_a_bucket_nothing_is_started(work: Work, tmp_path: Path) -> None:
    store = tmp_path / "store"
    target = ("--set", "publish.url=s3://absent/x", "--set", "publish.folder=null")
    with s3_server() as s3:
        env = credentials(s3)
        done = work.quantize("run", RECIPE, "--store", str(store), *target, env=env)
    assert done.code == 2, done.err
    assert "no bucket absent" in done.err
    assert not list(store.glob("*/*/manifest.json"))
