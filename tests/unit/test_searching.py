"""`quantize search` from the command line, on a store that holds what the stages would make."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sensitivity_fixture import choice_of, record

from quantize.protocol import write_json
from quantize.recipe_file import load_recipe
from quantize.sensitivity import Choice
from quantize.session import Session
from tests.end_to_end.conftest import ROOT, Finished, environment

TINY = ROOT / "recipes" / "tiny-llama-awq-gptq.yaml"
Run = Callable[..., Finished]


@pytest.fixture
def quantize(tmp_path: Path) -> Run:
    def run(*arguments: str) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "quantize", *arguments, "--store", str(tmp_path / "store")],
            cwd=tmp_path,
            env=environment({"QUANTIZE_CACHE": str(tmp_path / "cache")}),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts calibrate and compress artifacts of a recipe into the store; fetch runs for real."""

    def make(recipe: Path, sensitivity: dict[str, Any] | None, **notes: str) -> None:
        monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
        session = Session.open(str(recipe), (), tmp_path / "store", online=True)
        for kind in ("calibrate", "compress"):
            entry = next(entry for entry in session.plan.stages if entry.id == kind)
            assert entry.key is not None
            with session.store.staging(kind, entry.key) as staging:
                write_json(staging.files / f"{kind}.json", {"engine": "stream", **notes})
                if kind == "compress" and sensitivity is not None:
                    write_json(staging.files / "sensitivity.json", sensitivity)
                session.store.commit(
                    staging, key_inputs={}, recipe="x", seconds={"total": 0.0}, versions={}
                )

    return make


def test_a_recipe_with_the_frontier_beside_it(quantize: Run, made: Any, tmp_path: Path) -> None:
    made(TINY, record())
    done = quantize("search", str(TINY), "--budget", "6bits", "--schemes", "W4A16_ASYM,W8A16,BF16")
    assert done.code == 0, done.err
    stem = tmp_path / "tiny-llama-awq-gptq-6bits"  # the given recipe is a shipped one
    for suffix in (".yaml", ".frontier.json", ".frontier.png", ".frontier.svg"):
        assert Path(f"{stem}{suffix}").name in done.out
        assert Path(f"{stem}{suffix}").stat().st_size > 0
    assert "next: quantize run tiny-llama-awq-gptq-6bits.yaml" in done.out
    frontier = json.loads(Path(f"{stem}.frontier.json").read_text())
    assert frontier["chosen"]["bits"] <= 6
    source = json.loads(next((tmp_path / "store" / "fetch").glob("*/source.json")).read_text())
    everything = 2 * frontier["parameters"] + frontier["bytes_of_other_tensors"]
    assert everything == source["weight_bytes"]  # a BF16 checkpoint
    assert frontier["frontier"][-1]["bytes"] == everything
    written = load_recipe(f"{stem}.yaml")
    for linear in record()["linears"]:
        unit = frontier["chosen"]["units"][linear["unit"]]
        chosen = Choice(unit["scheme"], unit["group_size"])
        assert choice_of(written.quantize, linear["name"]) == chosen
    schema = (ROOT / "recipes/recipe.schema.json").as_uri()
    assert f"$schema={schema}\n" in Path(f"{stem}.yaml").read_text()
    plan = quantize("plan", f"{stem}.yaml", "--json")
    assert plan.code == 0, plan.err


def test_json_is_the_frontier_and_the_choice(quantize: Run, made: Any, tmp_path: Path) -> None:
    made(TINY, record())
    arguments = ("search", str(TINY), "--budget", "7.9MB", "--json")
    done = quantize(*arguments)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert value["chosen"]["bytes"] <= 7_900_000
    assert value["files"]["recipe"] == "tiny-llama-awq-gptq-7.9mb.yaml"
    again = quantize(*arguments)
    assert again.code == 2
    assert "--force" in again.err
    assert quantize(*arguments, "--force").out == done.out


def test_a_recipe_elsewhere_names_the_same_inputs(quantize: Run, made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copytree(ROOT / "examples/tiny_llama/instruct", folder / "model")
    text = TINY.read_text().replace("examples/tiny_llama/instruct", "model")
    (folder / "a.yaml").write_text(text)
    made(folder / "a.yaml", record())
    output = tmp_path / "other" / "b.yaml"
    options = ("--budget", "6bits", "--set", "calibration.samples=128")
    done = quantize("search", str(folder / "a.yaml"), *options, "--output", str(output))
    assert done.code == 0, done.err
    written = load_recipe(output)
    assert written.model.source == str(folder / "model")
    assert written.calibration is not None
    assert written.calibration.source == "examples/tiny_llama/calibration.jsonl"
    beside = quantize("search", str(folder / "a.yaml"), "--budget", "6bits")
    assert beside.code == 0, beside.err
    assert load_recipe(folder / "a-6bits.yaml").model.source == "model"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tiny-llama-awq", "--budget", "4.5"), 2, "4.5bits"),
        (("tiny-llama-awq",), 2, "--budget"),
        (("tiny-llama-awqq", "--budget", "5bits"), 2, "no recipe"),
        (("tiny-llama-fp8", "--budget", "5bits"), 2, "no calibration data"),
        (
            ("tiny-llama-awq", "--budget", "5bits", "--set", "quantize.engine=llmcompressor"),
            2,
            "streaming engine",
        ),
    ],
)
def test_mistakes_that_are_found_before_anything_runs(
    quantize: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = quantize("search", *arguments)
    assert done.code == code
    assert words in done.err
    assert not (tmp_path / "store").exists()


def test_mistakes_that_the_record_shows(quantize: Run, made: Any) -> None:
    made(TINY, record())
    small = quantize("search", str(TINY), "--budget", "3bits")
    assert (small.code, "--schemes" in small.err) == (2, True)
    unknown = quantize("search", str(TINY), "--budget", "5bits", "--schemes", "W4A16,W3A16")
    assert unknown.code == 2
    assert "W4A16, W3A16 was not measured" in unknown.err


def test_an_architecture_that_the_engine_does_not_know(quantize: Run, made: Any) -> None:
    made(TINY, None, engine_note="architecture FooForCausalLM is not verified")
    done = quantize("search", str(TINY), "--budget", "5bits")
    assert done.code == 3
    assert "FooForCausalLM is not verified" in done.err
