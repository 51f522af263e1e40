"""`quantize check`: the same table that a run goes through, with everything that is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json, write_checkpoint, write_json
from hub_fixture import ACCOUNTS, TOKEN, hub_server, online

from quantize import checking
from quantize.checking import Report, check_recipe
from quantize.checklist import CHECKS
from quantize.errors import QuantizeError, SourceError, TransientError, UsageError
from quantize.session import Session
from tests.hub_server import Account, Fault, Hub, HubServer
from tests.unit.test_cli import quantize  # noqa: F401  (a fixture)

ROWS = '{"messages": [{"role": "user", "content": "Hello"}]}\n{"text": "Some text."}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment is installed, no token is there."""
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QUANTIZE_ACCELERATOR", "cpu")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


def write_recipe(folder: Path, **changes: Any) -> str:
    """A recipe (JSON is YAML) beside a checkpoint and calibration rows."""
    recipe: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "model"},
        "calibration": {"source": "rows.jsonl", "sequence_length": 128},
        "quantize": {"method": "awq", "group_size": 32},
    }
    write_json(folder / "recipe.yaml", recipe | changes)
    (folder / "rows.jsonl").write_text(ROWS)
    return str(folder / "recipe.yaml")


def check(folder: Path, recipe: str, *, asks: bool = True) -> Report:
    return check_recipe(recipe, (), folder / "store", online=asks)


def row(report: Report, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)


def messages(report: Report) -> str:
    return " | ".join(f"{finding.message} → {finding.hint}" for finding in report.findings)


def test_a_sound_recipe(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", shards=2)
    report = check(tmp_path, write_recipe(tmp_path))
    assert report.findings == []
    assert report.exit_code == 0
    assert [c.name for c in report.checks] == ["recipe", "inputs", *(c.name for c in CHECKS)]
    assert row(report, "tensor names and shapes").outcome == "passed"
    assert row(report, "Hub target").told.skipped == "nothing is published to the Hub"
    (note,) = row(report, "environments").told.notes
    assert "llmcompressor is not installed yet" in note
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("scheme", "noted"), [("Q4_K_M", True), ("Q8_0", False)])
def test_a_type_that_gets_no_importance_matrix(scheme: str, noted: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    block = {"format": "gguf", "scheme": scheme}
    for calibration in (None, {"source": "rows.jsonl", "sequence_length": 128}):
        recipe = write_recipe(tmp_path, quantize=block, calibration=calibration)
        notes = row(check(tmp_path, recipe), "schemes and groups").told.notes
        assert any("without an importance matrix" in note for note in notes) == (
            noted and calibration is None
        )


def test_faults_of_all_kinds_at_once_for_check_and_run_alike(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        model={"source": "no/where/to/be/found"},
        calibration={"source": "missing.jsonl"},
        evaluate={"suite": "tinny"},
        publish={"hub": {"repo": "ann/tiny"}},
    )
    report = check(tmp_path, recipe)
    said = messages(report)
    for part in ("model.source: there is no folder", "missing.jsonl", "no suite", "no token"):
        assert part in said
    assert report.exit_code == UsageError.exit_code  # the suite's name
    with pytest.raises(QuantizeError) as error:
        Session.open(recipe, (), tmp_path / "store", online=True)
    assert error.value.exit_code == report.exit_code
    for finding in report.findings:
        assert finding.message in error.value.message
        assert finding.hint in error.value.message


def test_a_broken_checkpoint_does_not_hide_the_rest(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    recipe = write_recipe(tmp_path, publish={"hub": {"repo": "ann/tiny"}})
    (tmp_path / "rows.jsonl").write_text("")
    report = check(tmp_path, recipe)
    said = messages(report)
    assert "model-00002-of-00003.safetensors is missing" in said
    assert "rows.jsonl is empty" in said
    assert "no token" in said
    assert row(report, "tensor names and shapes").outcome == "unchecked"


def test_mistakes_of_the_recipe_itself(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, quantize={"method": "awq", "group_sizes": 32, "ignore": 3})
    report = check(tmp_path, recipe)
    assert report.exit_code == 2
    assert "2 mistakes in" in messages(report)
    assert {c.outcome for c in report.checks[1:]} == {"unchecked"}


def test_a_template_matters_where_something_renders_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", template="{% if %}")
    report = check(tmp_path, write_recipe(tmp_path))
    assert "syntax error" in messages(report)
    recipe = write_recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "Some text."}\n')
    report = check(tmp_path, recipe)
    assert report.findings == []
    assert "syntax error" in row(report, "chat template").told.notes[0]


def test_the_command_line(quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    write_checkpoint(tmp_path / "model")
    recipe = write_recipe(tmp_path)
    done = quantize("check", recipe, "--offline")
    assert done.code == 0, done.err
    assert "✓  tensor names and shapes" in done.out
    assert "a run can begin" in done.out
    done = quantize("check", recipe, "--offline", "--set", "quantize.group_size=96", "--json")
    assert done.code == 3
    found = done.json()
    assert found["exit_code"] == 3
    (groups,) = [c for c in found["checks"] if c["name"] == "schemes and groups"]
    assert groups["outcome"] == "failed"
    (finding,) = groups["findings"]
    assert "group size 96 does not divide" in finding["message"]
    assert finding["hint"].startswith("set quantize.group_size")
    assert (finding["kind"], finding["exit_code"]) == ("SourceError", 3)
    run = quantize("run", recipe, "--set", "quantize.group_size=96")
    assert run.code == 3
    assert finding["message"] in run.err


# Sources on a Hub

SOURCE = "acme/tiny"


def publish(server: HubServer, folder: Path, **state: Any) -> str:
    """The folder's files as a commit of SOURCE; its id."""
    repo = server.hub.create("model", SOURCE, private=state.get("private", False))
    repo.gated = state.get("gated", False)
    from tests.hub_server.repos import File

    tree = {
        path.name: File(path.read_bytes(), lfs=path.suffix == ".safetensors")
        for path in folder.iterdir()
    }
    return repo.commit("main", tree, "all")


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serve a checkpoint; gives the server's context, the checkpoint's folder and a recipe."""
    online(monkeypatch)
    folder = write_checkpoint(tmp_path / "made", shards=3)

    def recipe(server: HubServer, **model: Any) -> str:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        return write_recipe(tmp_path, model={"source": SOURCE, **model})

    return folder, recipe


def test_a_hub_checkpoint_is_checked_by_its_headers(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    with hub_server() as server:
        commit = publish(server, folder)
        report = check(tmp_path, recipe(server))
        assert report.findings == []
        assert row(report, "tensor names and shapes").outcome == "passed"
        assert row(report, "tokenizer").outcome == "passed"
        assert f"model: {SOURCE} at commit {commit[:12]}" in row(report, "Hub sources").told.notes
    weights = [seen for seen in server.seen if seen.path.endswith(".safetensors")]
    assert {seen.headers.get("range") for seen in weights if seen.method == "GET"} == {
        "bytes=0-262143"
    }


def test_a_hub_checkpoint_whose_config_is_anothers(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": 3})
    with hub_server() as server:
        publish(server, folder)
        report = check(tmp_path, recipe(server))
    assert "no tensor of layer 2" in messages(report)
    assert report.exit_code == 3


def test_pickled_weights_and_code_on_the_hub(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_own.py").write_text("print()")
    with hub_server() as server:
        publish(server, folder)
        said = messages(check(tmp_path, recipe(server)))
    assert "holds only pickled weights (pytorch_model.bin)" in said
    assert "brings Python code (modeling_own.py)" in said


def test_code_on_the_hub_is_pinned_by_its_commit(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    edit_json(folder / "config.json", {"auto_map": {"AutoModel": "modeling_x.X"}})
    (folder / "modeling_x.py").write_text("from .helpers import y")
    (folder / "helpers.py").write_text("y = 1")
    with hub_server() as server:
        commit = publish(server, folder)
        unpinned = messages(check(tmp_path, recipe(server)))
        assert "which is never run unread" in unpinned
        assert (
            f"read helpers.py, modeling_x.py and set model.trust_remote_code: {commit}" in unpinned
        )
        other = messages(check(tmp_path, recipe(server, trust_remote_code="0" * 40)))
        assert f"read it again, and set model.trust_remote_code: {commit}" in other
        assert check(tmp_path, recipe(server, trust_remote_code=commit)).findings == []
    assert not [seen for seen in server.seen if seen.path.endswith(".py")]  # nothing is brought


def test_shards_without_a_whole_header_on_the_hub(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"")
    (folder / "model-00002-of-00003.safetensors").write_bytes(
        (1 << 20).to_bytes(8, "little") + b"{"
    )
    with hub_server() as server:
        publish(server, folder)
        said = messages(check(tmp_path, recipe(server)))
    assert "it has 0 bytes" in said
    assert "model-00002-of-00003.safetensors is truncated" in said


def test_a_header_that_is_larger_than_any_is_not_brought(
    tmp_path: Path, on_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = on_hub
    limit = 8 << 20
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes((limit + 1).to_bytes(8, "little") + b"{" + b" " * limit)
    for module in ("hub.outline", "tensors"):
        monkeypatch.setattr(f"quantize.{module}.HEADER_LIMIT_BYTES", limit)
    with hub_server() as server:
        publish(server, folder)
        said = messages(check(tmp_path, recipe(server)))
    assert f"a header of {limit + 1} bytes (at most {limit})" in said
    asked = [seen for seen in server.seen if seen.method == "GET"]
    ranges = {seen.headers.get("range") for seen in asked if seen.path.endswith(shard.name)}
    assert ranges == {"bytes=0-262143"}


def test_a_file_that_is_larger_than_any_is_not_brought(
    tmp_path: Path, on_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = on_hub
    (folder / "tokenizer.json").write_text(" " * (1 << 20) + "{}")
    for module in ("hub.outline", "model_files"):
        monkeypatch.setattr(f"quantize.{module}.JSON_LIMIT_BYTES", 1 << 20)
    with hub_server() as server:
        publish(server, folder)
        said = messages(check(tmp_path, recipe(server)))
    assert f"{SOURCE}/tokenizer.json has {(1 << 20) + 2} bytes, far more than" in said
    asked = [seen for seen in server.seen if seen.method == "GET"]
    assert not [seen for seen in asked if seen.path.endswith("tokenizer.json")]


def test_half_an_outline_is_no_broken_checkpoint(
    tmp_path: Path, on_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = on_hub

    def gone(*_: object) -> bytes:
        raise TransientError("the Hub went away", "try again")

    monkeypatch.setattr("quantize.hub.outline._range", gone)
    with hub_server() as server:
        publish(server, folder)
        report = check(tmp_path, recipe(server))
    assert messages(report) == "the Hub went away → try again"
    assert row(report, "checkpoint files").outcome == "unchecked"


def test_what_is_missing_is_not_called_unfetched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    report = check(tmp_path, write_recipe(tmp_path, calibration={"source": "missing.jsonl"}))
    assert "neither here nor at a known commit" in row(report, "calibration data").told.unchecked
    pinned = {"source": "acme/rows", "revision": "0" * 40}
    report = check(tmp_path, write_recipe(tmp_path, calibration=pinned), asks=False)
    assert "before it is fetched" in row(report, "calibration data").told.unchecked


def test_a_gate_says_where_its_terms_are(
    tmp_path: Path, on_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = on_hub
    accounts = ACCOUNTS | {"hf_accepted": Account("bob", accepted=frozenset({SOURCE}))}
    with HubServer(Hub(accounts)) as server:
        publish(server, folder, gated="auto")
        path = recipe(server)
        for token, gated in ((None, True), (TOKEN, True), ("hf_accepted", False)):
            if token is not None:
                monkeypatch.setenv("HF_TOKEN", token)
            report = check(tmp_path, path)
            assert (f"accept its terms at {server.endpoint}/{SOURCE}" in messages(report)) == gated
            assert report.exit_code == (5 if gated else 0)


@pytest.mark.parametrize(
    ("model", "state", "said", "code"),
    [
        ({"revision": "v9"}, {}, "Invalid rev id: v9", 3),
        ({"revision": "0" * 40}, {}, "no such revision", 3),
        ({"source": "acme/other"}, {}, "no such repository, or a private one", 3),
        ({}, {"private": True}, "no such repository, or a private one", 3),
    ],
)
def test_what_is_not_there(
    tmp_path: Path, on_hub: Any, model: dict, state: dict, said: str, code: int
) -> None:
    folder, recipe = on_hub
    with hub_server() as server:
        publish(server, folder, **state)
        report = check(tmp_path, recipe(server, **model))
    assert said in messages(report)
    assert report.exit_code == code


def test_a_gated_data_set(tmp_path: Path, on_hub: Any) -> None:
    folder, recipe = on_hub
    from tests.hub_server.repos import File

    with hub_server() as server:
        publish(server, folder)
        rows = server.hub.create("dataset", "acme/rows", private=False)
        rows.gated = "manual"
        files = {"README.md": File(b"# Rows", lfs=False), "rows.jsonl": File(b"{}", lfs=False)}
        commit = rows.commit("main", files, "all")
        path = recipe(server)
        stated = json.loads(Path(path).read_text())
        stated["calibration"] |= {"source": "acme/rows", "revision": commit}
        write_json(Path(path), stated)
        report = check(tmp_path, path)
    assert f"accept its terms at {server.endpoint}/datasets/acme/rows" in messages(report)
    assert report.exit_code == 5
    asked = [seen.path for seen in server.seen if "rows/resolve" in seen.path]
    assert all(path.endswith("rows.jsonl") for path in asked)


def test_a_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, on_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = on_hub
    monkeypatch.setattr("quantize.hub.client.Access.retry_seconds", (), raising=False)
    monkeypatch.setattr(
        "quantize.hub.repository.access_from_environment", lambda: _access(os.environ)
    )
    with hub_server(Fault("api", status=503, times=99)) as server:
        report = check(tmp_path, recipe(server, base="acme/base"))
        asked = len(server.seen)
    assert report.exit_code == 75
    assert "answered 503" in messages(report)
    assert asked == 1


def _access(variables: Any) -> Any:
    from quantize.hub.client import Access

    return Access(variables["HF_ENDPOINT"], None, retry_seconds=())


def test_an_unforeseen_error_is_not_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model")
    recipe = write_recipe(tmp_path)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("quantize.checklist.check_tokenizer", broken)
    with pytest.raises(ZeroDivisionError):
        check(tmp_path, recipe)

    def foreseen(*_: object) -> None:
        raise SourceError("foreseen", "do this")

    monkeypatch.setattr("quantize.checklist.check_tokenizer", foreseen)
    report = check(tmp_path, recipe)
    assert messages(report) == "foreseen → do this"
    assert checking.INPUTS == "inputs"
