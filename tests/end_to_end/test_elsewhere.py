"""Other formats and other people's artifacts, with the real tools and through the real server.

Where the processor has no kernel for 4-bit weights, the server gets them unpacked to BF16;
elsewhere the same tests ask the kernels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.checkpoint import read_checkpoint
from quantize.environments import accelerator as here
from quantize.recipe_file import load_recipe
from quantize.resources import find_recipe
from quantize.servers import cannot_serve
from quantize.tensors import load_tensor
from quantize.unpacked import write_unpacked
from tests.end_to_end.conftest import ROOT, Work

pytestmark = pytest.mark.end_to_end

INSTRUCT = ROOT / "examples" / "tiny_llama" / "instruct"
SERVE = ("max_model_len=1024", "kv_cache_gib=1", "max_num_seqs=16", "tensor_parallel_sizes=[]")
"""As the shipped recipes say it, so that the baseline is the same measurement."""


@pytest.fixture(scope="module")
def adopted(work: Work) -> Callable[[str], dict[str, Any]]:
    """The card's record of `quantize measure` on a folder that an engine wrote."""
    cache: dict[str, dict[str, Any]] = {}

    def record(engine: str) -> dict[str, Any]:
        if engine not in cache:
            made = work.run(f"tiny-llama-{engine}", "--until", "audit")
            theirs = work.folder / f"by-{engine}"
            shutil.copytree(made["places"]["artifact"], theirs)
            sets = [part for value in SERVE for part in ("--set", f"serve.{value}")]
            sets += ["--set", "evaluate.gate={inconclusive: pass}", "--set", "model.base=null"]
            done = work.quantize(
                *("measure", theirs.name, "--source", str(INSTRUCT), "--suite", "tiny"),
                *("--store", str(work.store), "--json", *sets),
            )
            assert done.code == 0, done.err + done.out
            cache[engine] = json.loads(Path(done.json()["places"]["record"]).read_text())
        return cache[engine]

    return record


@pytest.mark.parametrize(
    ("engine", "method", "scheme", "ratio"),
    [("autoawq", "awq", "W4A16_ASYM", 1.05), ("gptqmodel", "gptq", "W4A16", 1.10)],
)
def test_an_artifact_of_another_tool_is_measured_as_it_is(
    adopted: Callable[[str], dict[str, Any]],
    work: Work,
    engine: str,
    method: str,
    scheme: str,
    ratio: float,
) -> None:
    record = adopted(engine)
    asked = record["recipe"]["quantize"]
    assert (asked["engine"], asked["method"], asked["scheme"]) == ("elsewhere", method, scheme)
    assert asked["format"] == method
    assert record["compress"]["made_by"].startswith(method)
    assert all(check["passed"] for check in record["audit"]["checks"])
    assert record["audit"]["quantized_modules"] == 28
    compare = record["compare"]
    assert 1.0 <= compare["perplexity"]["ratio"] < ratio
    assert compare["divergence"]["top1_agreement"] > 0.9
    assert {task["name"] for task in compare["tasks"]} == {"valley_mc", "valley_qa"}
    unpacked = "unpacked" in record["candidate"]
    assert unpacked == (cannot_serve("vllm", method, scheme, here()) is not None)
    # nothing was quantized: the store has what was adopted, byte by byte
    key = record["artifacts"]["compress"]
    ours = work.store / "adopt" / key / "model" / "model.safetensors"
    theirs = work.folder / f"by-{engine}" / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


def test_engines_stand_side_by_side(adopted: Callable[[str], dict[str, Any]], work: Work) -> None:
    names = [adopted(engine)["recipe"]["name"] for engine in ("autoawq", "gptqmodel")]
    page = work.folder / "engines.html"
    done = work.quantize(
        *("compare", *names, "--store", str(work.store), "--json", "-o", str(page))
    )
    assert done.code == 0, done.err
    said = done.json()
    assert [one["Format"] for one in said["results"]] == ["awq", "gptq"]
    assert all("KL divergence, mean (nats)" in one for one in said["results"])
    assert said["remarks"] == []  # one baseline, one device, the same tokens and prompts
    assert names[0] in page.read_text()


@pytest.mark.parametrize(
    ("recipe", "form"), [("tiny-llama-awq", "awq"), ("tiny-llama-gptq", "gptq")]
)
def test_repacked_weights_are_the_same_numbers(
    recipe: str, form: str, work: Work, tmp_path: Path
) -> None:
    """What a server computes with is equal bit by bit, before and after; the audit takes both."""
    plain = work.run(recipe, "--until", "audit")
    repacked = work.run(recipe, "--until", "audit", "--set", f"quantize.format={form}")
    folders = []
    for result, overrides in ((plain, ()), (repacked, (f"quantize.format={form}",))):
        quantize = load_recipe(find_recipe(recipe), overrides).quantize
        folder = tmp_path / str(len(folders))
        write_unpacked(
            Path(result["places"]["artifact"]), INSTRUCT, quantize, folder, lambda *_: None
        )
        folders.append(folder)
    before, after = (read_checkpoint(folder).tensors for folder in folders)
    assert before.keys() == after.keys()
    for name, info in before.items():
        assert np.array_equal(load_tensor(info), load_tensor(after[name])), name
    states = {stage["id"]: stage["state"] for stage in repacked["stages"]}
    assert states["compress"] == "hit"  # nothing was quantized again
