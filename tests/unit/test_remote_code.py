"""Code of a checkpoint: refused unread, taken by its pin, refused again when it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from quantize.checkpoint import examine
from quantize.errors import SourceError
from quantize.planner import plan
from quantize.remote_code import LET_IN, code_digest
from quantize.servers import vllm
from quantize.servers.base import Launch
from quantize.stages import fetch
from quantize.stages.base import Resolved
from tests.unit.checkpoints import edit_json, llama_tensors, recipe, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that brings code."""
    folder = write_checkpoint(tmp_path / "model", llama_tensors(layers=1))
    edit_json(folder / "config.json", {"auto_map": {"AutoModel": "modeling_x.X"}})
    (folder / "modeling_x.py").write_text("from .helpers import y\n")
    (folder / "helpers.py").write_text("y = 1\n")
    return folder


def said(folder: Path, code: str | None) -> str:
    return "\n".join(f"{f.message}\n{f.hint}" for f in examine(folder, code=code)[1])


def test_the_refusal_says_what_to_write_and_that_is_taken(folder: Path) -> None:
    refusal = said(folder, None)
    assert "modeling_x.py, auto_map in config.json" in refusal
    assert f"trust_remote_code: {code_digest(folder)}" in refusal
    assert "helpers.py" in refusal  # what is imported is to be read, too
    assert said(folder, code_digest(folder)) == ""


@pytest.mark.parametrize("name", ["modeling_x.py", "helpers.py", "new.py"])
def test_other_code_than_was_read_is_refused(folder: Path, name: str) -> None:
    pin = code_digest(folder)
    with open(folder / name, "a") as file:
        file.write("# changed\n")
    assert "is not the one which model.trust_remote_code names" in said(folder, pin)


def test_names_count_and_no_link_leads_elsewhere(folder: Path) -> None:
    pin = code_digest(folder)
    (folder / "helpers.py").rename(folder / "other.py")
    assert "is not the one" in said(folder, pin)
    (folder / "other.py").rename(folder.parent / "helpers.py")
    (folder / "helpers.py").symlink_to(folder.parent / "helpers.py")
    assert "symbolic link" in said(folder, pin)


def test_a_pin_without_code(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    assert "brings no code" in said(folder, "0" * 64)


def test_what_the_fetch_stage_let_in(folder: Path) -> None:
    assert said(folder, LET_IN) == ""


def test_of_a_repository_the_commit_is_the_pin() -> None:
    fetch._require_read("owner/name", "1" * 40, "1" * 40)
    for pin in ("2" * 40, "1" * 64):
        with pytest.raises(SourceError, match="is fetched at 1111"):
            fetch._require_read("owner/name", "1" * 40, pin)


@pytest.mark.parametrize("pin", ["true", "main", "0" * 39, "A" * 40, "0" * 41, ""])
def test_a_pin_is_no_switch(pin: str) -> None:
    with pytest.raises(ValidationError):
        recipe("x", model={"source": "x", "trust_remote_code": pin})


def test_not_with_an_adapter() -> None:
    with pytest.raises(ValidationError, match="merge it first"):
        recipe("x", model={"source": "x", "adapter": "y", "trust_remote_code": "0" * 40})


def test_the_pin_is_in_every_key_that_follows() -> None:
    def keys(**model: str) -> list[str | None]:
        resolved = Resolved(
            recipe("x", model={"source": "x", **model}),
            Path(),
            "cpu",
            {"model": "0" * 64, "calibration": "1"},
        )
        return [entry.key for entry in plan(resolved, lambda _: "lock").stages]

    without, one, two = keys(), *(keys(trust_remote_code=c * 40) for c in "ab")
    for other in (one, two):
        assert not set(without[:3]) & set(other[:3])
    assert not set(one[:3]) & set(two[:3])


@pytest.mark.parametrize("trusted", [False, True])
def test_the_server_is_told(trusted: bool) -> None:
    serve = recipe("x").serve
    launch = Launch(Path("p"), Path("m"), "m", 1, "cpu", serve, 1, trust_remote_code=trusted)
    command = vllm.command(launch)
    assert ("--trust-remote-code" in command) == trusted
    assert command[command.index("--load-format") + 1] == "safetensors"
