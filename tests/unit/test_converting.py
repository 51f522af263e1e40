"""`quantize convert` and the stage: folders and recipes in, a folder out, nothing overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_tensors, write_checkpoint
from click.testing import CliRunner
from quantized import write_quantized
from records_fixture import artifact, new_store, stage_context
from repacked import llama_numbers, write_stored
from test_repacking import dequantized

from quantize.artifact_formats import FORMATS
from quantize.cli import main
from quantize.cli.results import STORED_FORMATS
from quantize.converting import find_artifact
from quantize.errors import UsageError
from quantize.planner import STAGES
from quantize.progress import LineView, Progress
from quantize.quantization import Quantize
from quantize.runner import Runner
from quantize.stages import convert as stage
from quantize.store import Store


def test_the_command_offers_every_format() -> None:
    assert tuple(FORMATS) == STORED_FORMATS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_stored(tmp_path / "source", "gptq", llama_numbers())


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run(source, "--format", "awq", "--json")
    assert code == 0
    result = json.loads(said[said.index("{\n") :])
    assert result == {
        "folder": str(tmp_path / "source-awq"),
        "before": "gptq",
        "after": "awq",
        "modules": 14,
        "bytes_before": result["bytes_before"],
        "bytes_after": result["bytes_after"],
    }
    before, after = dequantized(source), dequantized(tmp_path / "source-awq")
    assert all((after[module] == before[module]).all() for module in before)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "source-awq"}


def test_nothing_is_overwritten_unless_it_is_a_checkpoint_and_asked_for(
    source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    code, said = run(source, "--format", "awq", "-o", other)
    assert (code, "exists" in said, "--force" in said) == (2, True, True)
    (other / "thesis.txt").touch()
    code, said = run(source, "--format", "awq", "-o", other, "--force")
    assert (code, "other things than a checkpoint" in said) == (2, True)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    target = tmp_path / "target"
    assert run(source, "--format", "awq", "-o", target)[0] == 0
    (target / "old").touch()
    assert run(source, "--format", "awq", "-o", target)[0] == 2
    assert run(source, "--format", "awq", "-o", target, "--force")[0] == 0
    assert not (target / "old").exists()
    for place in (source, source / "inside", tmp_path):
        code, said = run(source, "--format", "awq", "-o", place, "--force")
        assert (code, "overlaps" in said) == (2, True), place
    file = tmp_path / "file"
    file.touch()
    assert run(source, "--format", "awq", "-o", file, "--force")[0] == 2


def test_what_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_bytes(b"\0" * 64)
    target = tmp_path / "target"
    code, said = run(source, "--format", "awq", "-o", target)
    assert code == 3
    assert "model.safetensors is not a valid safetensors file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fault", ["code", "link", "pipe"])
def test_hostile_folders(source: Path, tmp_path: Path, fault: str) -> None:
    if fault == "code":
        (source / "modeling_own.py").write_text("raise SystemExit(9)")
        config = json.loads((source / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (source / "config.json").write_text(json.dumps(config))
    elif fault == "link":
        (source / "tokenizer.json").unlink()
        (source / "tokenizer.json").symlink_to("/etc/passwd")
    else:
        (source / "tokenizer.json").unlink()
        os.mkfifo(source / "tokenizer.json")
    code, _ = run(source, "--format", "awq", "-o", tmp_path / "target")
    assert code == 3
    assert not (tmp_path / "target").exists()


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    fp8 = Quantize(method="fp8", scheme="FP8_DYNAMIC")
    source = write_quantized(tmp_path / "source", llama_tensors(), fp8)
    code, said = run(source, "--format", "gptq", "-o", tmp_path / "target")
    assert (code, "float-quantized, not pack-quantized" in said) == (3, True)
    plain = write_checkpoint(tmp_path / "plain")
    code, said = run(plain, "--format", "gptq", "-o", tmp_path / "target")
    assert (code, "is not quantized" in said) == (3, True)
    assert run(plain, "--format", "gguf")[0] == 2


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    code, said = run("no-such-thing", "--format", "awq", "--store", tmp_path)
    assert (code, "there is no folder and no recipe 'no-such-thing'" in said) == (2, True)
    file = tmp_path / "model.safetensors"
    file.touch()
    assert run(file, "--format", "awq", "--store", tmp_path)[0] == 2


def test_a_recipe_whose_result_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="the result of tiny-llama-awq is not in the store") as no:
        find_artifact("tiny-llama-awq", Store(tmp_path / "store"))
    assert no.value.hint == "quantize run tiny-llama-awq --until compress"


def test_an_artifact_of_the_store_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "key" / "model").mkdir(parents=True)
    assert find_artifact(str(tmp_path / "key"), Store(tmp_path)).folder.name == "model"


def run_stage(folder: Path, quantize: dict[str, Any], lines: list[str]) -> Path:
    store = new_store(folder)
    made = Quantize.model_validate_json(
        json.dumps({key: value for key, value in quantize.items() if key != "format"})
    )
    ours = write_quantized(folder / "ours", llama_tensors(), made)
    files: dict[str, Any] = {f"model/{path.name}": path.read_bytes() for path in ours.iterdir()}
    compressed = artifact(
        store,
        "compress",
        "c" * 64,
        files | {"compress.json": {"method": "rtn", "seconds": 3.5}},
        versions={"torch": "2.13.0"},
    )
    recipe = {"version": 1, "name": "tiny", "model": {"source": "x"}, "quantize": quantize}
    context = stage_context(folder, store, "convert", {"compress": compressed}, recipe)
    context.runner = Runner(None, folder, Progress(LineView(lines.append)))  # type: ignore[arg-type]
    assert stage.key_inputs(context.resolved, "convert") == {"format": quantize["format"]}
    stage.run(context)
    assert context.versions == {"torch": "2.13.0"}
    return context.files


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_stage(tmp_path: Path, scheme: str, name: str) -> None:
    quantize = {"method": "rtn", "scheme": scheme, "group_size": 32, "format": name}
    lines: list[str] = []
    files = run_stage(tmp_path, quantize, lines)
    record = json.loads((files / "compress.json").read_text())
    assert record["method"] == "rtn" and record["seconds"] == 3.5
    conversion = record["conversion"]
    assert (conversion["before"], conversion["after"]) == ("compressed-tensors", name)
    assert conversion["modules"] == 14
    assert any("repacking the weights" in line for line in lines)
    before, after = dequantized(tmp_path / "ours"), dequantized(files / "model")
    assert all((after[module] == before[module]).all() for module in before)
    assert STAGES["convert"] is stage
