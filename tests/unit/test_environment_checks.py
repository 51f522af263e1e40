"""Environments and the server, as they are found before a run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from quantize import environment_checks
from quantize.environment_checks import check_environments, check_loopback, check_server
from quantize.environments import Environments
from quantize.errors import ResourceError


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_ACCELERATOR", "cpu")


def installed(tmp_path: Path, name: str, *packages: str) -> Environments:
    """An environment of nothing but a link to this interpreter and empty packages."""
    environments = Environments("cpu", tmp_path / "cache")
    folder = environments.folder(name)
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "python"
    paths = [str(folder / "packages" / package) for package in packages]
    for path in paths:
        Path(path).mkdir(parents=True)
        Path(path, "__init__.py").touch()
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/packages" exec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    (folder / "complete.json").write_text("{}")
    return environments


def test_an_environment_that_lost_a_package(tmp_path: Path) -> None:
    sound = installed(tmp_path, "llmcompressor", "torch", "llmcompressor", "peft")
    assert check_environments(sound, ["llmcompressor"]).findings == []
    shutil.rmtree(sound.folder("llmcompressor") / "packages" / "peft")
    (finding,) = check_environments(sound, ["llmcompressor", "llmcompressor"]).findings
    assert "environment llmcompressor does not work: no package peft" in finding.message
    assert f"remove {sound.folder('llmcompressor')}" in finding.hint
    assert finding.error is ResourceError


def test_the_users_interpreter(tmp_path: Path) -> None:
    own = Environments("cpu", tmp_path, {"vllm": tmp_path / "no" / "python"})
    (finding,) = check_environments(own, ["vllm"]).findings
    assert "environments.vllm.python" in finding.message


def test_an_interpreter_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 300\n")
    python.chmod(0o755)
    monkeypatch.setattr(environment_checks, "ANSWER_SECONDS", 0.3)
    (finding,) = check_environments(
        Environments("cpu", tmp_path, {"vllm": python}), ["vllm"]
    ).findings
    assert "its interpreter did not answer within" in finding.message


def test_without_uv_nothing_can_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> str:
        raise FileNotFoundError("no uv")

    monkeypatch.setattr(environment_checks, "uv", gone)
    told = check_environments(Environments("cpu", tmp_path), ["lmeval"])
    assert "uv, which installs the environments, is not there" in told.findings[0].message
    assert "about 1 GB" in told.notes[0]


def test_a_loopback_that_may_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_loopback().findings == []

    def refuse(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr("socket.socket.bind", refuse)
    assert "no server can listen on 127.0.0.1" in check_loopback().findings[0].message


def test_an_architecture_that_vllm_does_not_have(tmp_path: Path) -> None:
    environments = installed(tmp_path, "vllm", "torch", "vllm")
    assert check_server(environments, "LlamaForCausalLM") == []  # no table: nothing is said
    models = environments.folder("vllm") / "lib/python3.11/site-packages/vllm/model_executor/models"
    models.mkdir(parents=True)
    (models / "registry.py").write_text(
        '_MODELS = {\n    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),\n}\n'
    )
    assert check_server(environments, "LlamaForCausalLM") == []
    assert "no OwnForCausalLM of its own" in check_server(environments, "OwnForCausalLM")[0]
