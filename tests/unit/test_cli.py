"""The command line as a person meets it: help, mistakes, exit codes. No environment is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, Finished, environment

TINY = ROOT / "recipes" / "tiny-llama-awq.yaml"


@pytest.fixture
def quantize(tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(*arguments: str) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "quantize", *arguments],
            cwd=tmp_path,
            env=environment({"QUANTIZE_CACHE": str(tmp_path / "cache")}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def copied_recipe(folder: Path, old: str = "", new: str = "") -> Path:
    """The shipped recipe with absolute paths and one change."""
    text = TINY.read_text()
    text = text.replace("examples/tiny_llama", str(ROOT / "examples/tiny_llama"))
    assert old in text
    path = folder / "recipe.yaml"
    path.write_text(text.replace(old, new) if old else text)
    return path


def copied_model(folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(ROOT / "examples/tiny_llama/instruct", target)
    return target


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, quantize.cli; print(' '.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    for heavy in ("torch", "numpy", "pydantic", "huggingface_hub", "rich", "httpx", "yaml"):
        assert heavy not in loaded


def test_three_mistakes_are_three_lines_and_exit_2(quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = TINY.read_text()
    text = text.replace("group_size: 128", "group_sizes: 128")
    text = text.replace("samples: 128", "samples: many").replace("seed: 0", "seed: no")
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    done = quantize("run", str(path))
    assert done.code == 2
    assert "3 mistakes" in done.err
    assert done.err.count("wrong.yaml:") == 3
    assert "group_size" in done.err


def test_plan_of_a_real_recipe_offline(quantize) -> None:  # type: ignore[no-untyped-def]
    done = quantize("plan", "llama3-70b-awq", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert [stage["id"] for stage in plan["stages"]] == [
        "fetch", "calibrate", "compress", "audit", "measure-baseline", "measure-candidate",
        "measure-repeat", "fetch-base", "measure-base", "compare", "card", "publish",
    ]  # fmt: skip
    assert all(stage["reason"] for stage in plan["stages"])
    # the base has no pinned commit; what it is held against has
    pending = {stage["id"] for stage in plan["stages"] if not stage["key"]}
    assert pending == {"fetch-base", "measure-base", "compare", "card", "publish"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "tiny-lama-awq"), 2, "tiny-llama-awq"),
        (("run", "tiny-llama-awq", "--only", "compres"), 2, "compress"),
        (("run", "tiny-llama-awq", "--from", "card", "--until", "fetch"), 2, "--until"),
        (("run", "tiny-llama-awq", "--set", "quantize.metod=gptq"), 2, "method"),
        (("setup",), 2, "--all"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_usage_mistakes(quantize, arguments: tuple[str, ...], code: int, words: str) -> None:  # type: ignore[no-untyped-def]
    done = quantize(*arguments)
    assert done.code == code
    assert words in done.err


def test_stages_left_out_must_be_in_the_store(quantize) -> None:  # type: ignore[no-untyped-def]
    done = quantize("run", "tiny-llama-awq", "--only", "audit")
    assert done.code == 2
    assert "fetch is needed and not in the store" in done.err


class TestBadInput:
    """Each is one message and the right exit code, before any environment is touched."""

    def run(self, quantize, recipe: Path, code: int, *words: str) -> None:  # type: ignore[no-untyped-def]
        done = quantize("run", str(recipe))
        assert done.code == code, done.err
        for word in words:
            assert word in done.err
        assert done.err.count("error: ") == 1
        assert "next: " in done.err
        assert "installing environment" not in done.err

    def test_pickled_checkpoint(self, quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        model = copied_model(tmp_path)
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        recipe = copied_recipe(tmp_path, str(ROOT / "examples/tiny_llama/instruct"), str(model))
        self.run(quantize, recipe, 3, "pytorch_model.bin", "pickle")

    def test_missing_shard(self, quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        model = copied_model(tmp_path)
        (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"x.weight": "model-00002-of-00002.safetensors"}, "metadata": {}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        recipe = copied_recipe(tmp_path, str(ROOT / "examples/tiny_llama/instruct"), str(model))
        self.run(quantize, recipe, 3, "model-00002-of-00002.safetensors")

    def test_empty_calibration_file(self, quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        (tmp_path / "empty.jsonl").write_text("")
        old = str(ROOT / "examples/tiny_llama/calibration.jsonl")
        recipe = copied_recipe(tmp_path, old, "empty.jsonl")
        self.run(quantize, recipe, 3, "empty.jsonl")

    def test_group_size_that_does_not_divide(self, quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        recipe = copied_recipe(tmp_path, "group_size: 128", "group_size: 96")
        self.run(quantize, recipe, 3, "96", "256")


def test_a_run_that_fails_says_so_where_a_scheduler_looks(quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = copied_recipe(tmp_path, "group_size: 128", "group_size: 96")
    done = quantize("run", str(recipe), "--status", "now.json", "--metrics", "textfile/now.prom")
    assert done.code == 3
    status = json.loads((tmp_path / "now.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["error"]["kind"] == "SourceError"
    assert "96" in status["error"]["message"]
    run = Path(status["run"])
    assert json.loads((run / "status.json").read_text()) == status
    result = json.loads((run / "result.json").read_text())
    assert (result["exit_code"], result["error"]) == (3, status["error"])
    assert result["memory"]
    assert (result["pid"], result["host"]) == (status["pid"], status["host"])
    metrics = (tmp_path / "textfile" / "now.prom").read_text()
    assert 'quantize_exit_code{recipe="tiny-llama-awq"} 3.0' in metrics


@pytest.mark.parametrize(
    "arguments", [("--metrics", "now.txt"), ("--status", "/dev/null/now.json")]
)
def test_status_files_that_cannot_be(arguments: tuple[str, str], quantize) -> None:  # type: ignore[no-untyped-def]
    done = quantize("run", "tiny-llama-awq", *arguments)
    assert done.code == 2
    assert "next: name" in done.err


def test_schema_is_what_the_repository_ships(quantize) -> None:  # type: ignore[no-untyped-def]
    done = quantize("schema")
    assert done.out == (ROOT / "recipes" / "recipe.schema.json").read_text()


def test_store_commands_on_an_empty_store(quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = str(tmp_path / "nothing")
    assert quantize("store", "ls", "--store", store).code == 0
    verified = quantize("store", "verify", "--store", store)
    assert (verified.code, verified.out) == (0, "0 artifacts verified, 0 problems\n")
    assert quantize("store", "gc", "--store", store).code == 0
    assert not Path(store).exists()
