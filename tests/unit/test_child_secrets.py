"""What each child really has in its environment, with a canary in every variable that is a secret.

The interpreters of all environments are a stand-in that writes down its environment and ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantize.environments import Environments
from quantize.errors import QuantizeError
from quantize.process import SECRETS, is_secret, withhold
from quantize.progress import LineView, Progress
from quantize.runner import Runner
from quantize.servers import SERVERS
from quantize.servers.base import Launch
from quantize.stages import calibrate, compress
from quantize.stages.base import Resolved, StageContext
from quantize.status import Status
from quantize.store import Store
from tests.leaks import files, found
from tests.unit.checkpoints import recipe

CUSTOM = ("MY_OWN_VARIABLE",)  # named by publish.hub.token_env or the like
OTHERS = (
    *("WANDB_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "VLLM_API_KEY", "PGPASSWORD_TOKEN"),
    *("UV_INDEX_MINE_PASSWORD", "UV_INDEX_MINE_USERNAME", "UV_INDEX_URL", "UV_DEFAULT_INDEX"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_PUBLISH_TOKEN", "MY_PRIVATE_KEY", "DB_PASSWORD"),
    *("UV_FIND_LINKS", "PIP_FIND_LINKS", "UV_KEYRING_PROVIDER", "PIP_KEYRING_PROVIDER"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN_PATH", "SESSION_COOKIE"),
)
ALL = (*sorted(SECRETS), *CUSTOM, *OTHERS)
CANARIES = {name: f"canary-{number:03}-Zq8" for number, name in enumerate(ALL)}
ORDINARY = (
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "HTTPS_PROXY",
    "PYTORCH_CUDA_ALLOC_CONF",
)

STAND_IN = """\
import json, os, sys, time
with open(os.path.join(FOLDER, f"{time.time_ns()}.json"), "w") as file:
    json.dump({"argv": sys.argv, "env": dict(os.environ)}, file)
for argument in sys.argv:
    if argument.endswith(".result.json"):
        with open(argument, "w") as file:
            json.dump({"ok": False, "body": {}, "kind": "SourceError", "message": "m"}, file)
"""


class World:
    """A runner whose environments are all the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dumps = folder, folder / "dumps"
        self.dumps.mkdir()
        python = folder / "python"
        python.write_text(f"#!{sys.executable} -S\nFOLDER = {str(self.dumps)!r}\n{STAND_IN}")
        python.chmod(0o755)
        own = dict.fromkeys(("llmcompressor", "vllm", "lmeval"), python)
        self.said: list[str] = []
        progress = Progress(LineView(self.said.append, 0), Status([folder / "status.json"], {}))
        environments = Environments("cpu", folder / "cache", own)
        self.runner = Runner(environments, folder / "logs", progress)

    def last(self) -> dict[str, str]:
        environment: dict[str, str] = json.loads(max(self.dumps.iterdir()).read_text())["env"]
        return environment

    def context(self, digests: Mapping[str, str], paths: Mapping[str, Path]) -> StageContext:
        for name in ("files", "work"):
            (self.folder / name).mkdir(exist_ok=True)
        model = self.folder / "fetch"
        model.mkdir(exist_ok=True)
        source = {"kind": "folder", "folder": str(model), "architecture": "LlamaForCausalLM"}
        (model / "source.json").write_text(json.dumps(source))
        resolved = Resolved(recipe("model"), self.folder, "cpu", digests, paths)
        artifact: Any = _Artifact(model)
        inputs = {"fetch": artifact, "calibrate": artifact}
        entry: Any = None
        store = Store(self.folder / "store")
        return StageContext(
            entry, resolved, inputs, self.folder / "files", self.folder / "work", self.runner, store
        )


class _Artifact:
    """A folder with a manifest, as far as the stages look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = type("Manifest", (), {"kind": "fetch"})()

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def file(self, name: str) -> Path:
        return self.path / name


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    withhold(CUSTOM)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for name in ORDINARY:
        monkeypatch.setenv(name, "ordinary")
    return World(tmp_path)


def given(environment: Mapping[str, str]) -> set[str]:
    """Names of the secrets whose canary is in a child's environment, under whatever name."""
    values = "\n".join(environment.values())
    return {name for name, canary in CANARIES.items() if canary in values}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [("llmcompressor", name) for name in ("calibrate", "oneshot", "stream", "merge")]
    + [("lmeval", "evaluate"), ("lmeval", "texts"), ("vllm", "load")],
)
def test_no_worker_is_given_a_secret(world: World, environment: str, worker: str) -> None:
    with pytest.raises(QuantizeError):
        world.runner.worker(environment, worker, {}, work=world.folder, label=worker)
    assert given(world.last()) == set()
    assert {name: world.last()[name] for name in ORDINARY} == dict.fromkeys(ORDINARY, "ordinary")
    assert world.last()["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


@pytest.mark.parametrize("on_hub", [False, True])
def test_calibration_has_the_hubs_token_only_for_the_hub(world: World, on_hub: bool) -> None:
    rows = world.folder / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    digests = {"model": "0", "calibration": "owner/name@" + "0" * 40}
    context = world.context(digests, {} if on_hub else {"calibration": rows})
    with pytest.raises(QuantizeError):
        calibrate.run(context)
    assert given(world.last()) == ({"HF_TOKEN"} if on_hub else set())
    assert world.last().get("HF_HUB_OFFLINE") == (None if on_hub else "1")


def test_compress_is_offline_and_has_nothing(world: World) -> None:
    with pytest.raises(QuantizeError):
        compress.run(world.context({"model": "0"}, {}))
    assert given(world.last()) == set()
    assert world.last()["HF_HUB_OFFLINE"] == "1"


def test_a_server_has_nothing(world: World) -> None:
    backend = SERVERS["vllm"]
    launch = Launch(
        world.runner.python("vllm"), world.folder, "m", 1, "cpu", recipe("model").serve, 20
    )
    with world.runner.process(
        backend.command(launch), "server", env=backend.variables(launch)
    ) as process:
        process.wait()
    assert given(world.last()) == set()
    assert world.last()["HF_HUB_OFFLINE"] == "1"


def test_uv_has_the_credentials_of_indices_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executable is the stand-in: what uv does with it is uv's."""
    monkeypatch.setattr("quantize.environments.uv", lambda: str(world.folder / "python"))
    environments = Environments("cpu", world.folder / "cache")
    with pytest.raises(QuantizeError):
        environments.install("lmeval", world.runner.progress, world.folder / "logs/env.log")
    given_to = [
        (" ".join(said["argv"][1:]), given(said["env"]))
        for said in (json.loads(p.read_text()) for p in sorted(world.dumps.iterdir()))
    ]
    assert [secrets for command, secrets in given_to if " venv " in f" {command} "] == [set()]
    (installing,) = [secrets for command, secrets in given_to if "pip install" in command]
    of_indices = ("UV_INDEX", "UV_DEFAULT", "UV_FIND", "UV_KEYRING", "PIP_")
    assert installing == {n for n in CANARIES if n.startswith(of_indices)}


def test_nothing_written_or_said_holds_a_secret(world: World) -> None:
    rows = world.folder / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    for run, paths in ((calibrate.run, {"calibration": rows}), (compress.run, {})):
        with pytest.raises(QuantizeError):
            run(world.context({"model": "0"}, paths))
    for dump in world.dumps.iterdir():
        dump.unlink()
    texts = [*files(world.folder), ("what was said", "\n".join(world.said).encode())]
    assert {"request.json", "result.json"} <= {
        ".".join(Path(name).name.split(".")[-2:]) for name, _ in texts
    }
    assert found(texts, CANARIES) == set()


def test_names_of_secrets() -> None:
    assert all(is_secret(name) for name in ALL)
    assert not any(
        is_secret(name)
        for name in (*ORDINARY, "PATH", "HOME", "HF_HOME", "HF_HUB_OFFLINE", "MAX_TOKENS_X"[:3])
    )
