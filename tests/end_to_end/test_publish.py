"""`quantize run` with a Hub target, against a loopback server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Work
from tests.hub_server import Account, Hub, HubServer

pytestmark = pytest.mark.end_to_end

TOKEN = "hf_canaryEndToEnd"
RECIPE = "tiny-llama-fp8"
TARGET = ["--set", "publish.hub={repo: tester/tiny-fp8}", "--set", "publish.folder=null"]


def test_one_commit_that_holds_the_manifest(work: Work, tmp_path: Path) -> None:
    with HubServer(Hub({TOKEN: Account("tester")})) as server:
        env = {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        result = work.run(RECIPE, *TARGET, env=env)
        assert server.count("POST .*/commit/") == 1
        artifact = Path(result["places"]["artifact"])
        files = server.hub.repos["model", "tester/tiny-fp8"].tree("main")
        shards = sorted(artifact.glob("*.safetensors"))
        assert shards
        for shard in shards:
            assert files[shard.name].sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
        assert {"README.md", "config.json", "tokenizer.model", "quantize/record.json"} <= set(files)

        verified = work.quantize("verify", "tester/tiny-fp8", env=env)
        assert (verified.code, verified.out.splitlines()[-1].strip()) == (0, "verified")

        again = work.run(RECIPE, *TARGET, env=env)
        assert {stage["state"] for stage in again["stages"]} == {"hit"}
        assert server.count("POST .*/commit/") == 1

    for path in work.folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert TOKEN.encode() not in path.read_bytes(), path


def test_without_a_token_nothing_is_started(work: Work, tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")}
    store = tmp_path / "store"
    done = work.quantize("run", RECIPE, "--store", str(store), *TARGET, env=env)
    assert done.code == 5, done.err
    assert "HF_TOKEN" in done.err
    assert not list(store.glob("*/*/manifest.json"))
