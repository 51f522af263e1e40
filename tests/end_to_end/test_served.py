"""Every combination that the table of servers says was run on a CPU is served here once.

Those of `ALSO` are served, and measured in full, by other tests of this folder; the others get a
suite of seconds. Next to nothing is calibrated: what is tried is that the server takes the
artifact and computes with it what it should.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.environments import accelerator
from quantize.servers import cannot_serve
from quantize.servers.support import BF16, SUPPORT
from tests.end_to_end.conftest import ROOT, Work

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(accelerator() != "cpu", reason="the rows of a CPU"),
]

ALSO = {
    ("compressed-tensors", "W4A16_ASYM"): "test_recipes, tiny-llama-awq",
    ("compressed-tensors", "W4A16"): "test_recipes, tiny-llama-gptq",
    ("compressed-tensors", "FP8_DYNAMIC"): "test_recipes, tiny-llama-fp8",
    ("awq", "W4A16_ASYM"): "test_elsewhere, AutoAWQ",
    ("gptq", "W4A16"): "test_elsewhere, GPTQModel",
    ("gguf", "Q8_0"): "test_llamacpp",
}
RUN = {
    (row.format, scheme): row.server
    for row in SUPPORT
    if (row.accelerator, row.known) == ("cpu", "run")
    for scheme in row.schemes
    if scheme != BF16  # every measurement's baseline
}
HERE = sorted(RUN.keys() - ALSO.keys())

WORST = {"Q2_K": 2.0, "W4A16": 1.3}
"""Perplexity ratios that no sound artifact of the shipped checkpoint reaches; 1.2 of the others.
W4A16 is rounded to nearest here, outlier channels and all."""

RECIPE = """\
version: 1
name: served
model: {{source: {source}}}
calibration: {{source: {rows}, samples: 8, sequence_length: 128}}
quantize: {{method: {method}, scheme: {scheme}, format: {format}}}
serve: {{engine: {server}, max_model_len: 512, max_num_seqs: 8}}
evaluate: {{suite: short.yaml, noise: false, margins: {{perplexity_ratio: none}}}}
"""
SUITE = f"""\
version: 1
name: short
smoke: tiny
perplexity: {{text: {ROOT / "eval/texts/valley.jsonl"}, window: 256, windows: 8, top_k: 20}}
"""


def test_nothing_is_listed_that_is_not_in_the_table() -> None:
    assert RUN.keys() >= ALSO.keys()


@pytest.mark.parametrize(("form", "scheme"), HERE)
def test_it_is_served(form: str, scheme: str, work: Work, tmp_path: Path) -> None:
    recipe = tmp_path / "served.yaml"
    recipe.write_text(
        RECIPE.format(
            source=ROOT / "examples" / "tiny_llama" / "instruct",
            rows=ROOT / "examples" / "tiny_llama" / "calibration.jsonl",
            method={"W8A8": "int8"}.get(scheme, "gguf" if form == "gguf" else "rtn"),
            scheme=scheme,
            format=form,
            server=RUN[form, scheme],
        )
    )
    (tmp_path / "short.yaml").write_text(SUITE)
    result = work.run(recipe, "--until", "compare")
    keys = {stage["id"]: stage["key"] for stage in result["stages"]}
    compare = json.loads((work.store / "compare" / keys["compare"] / "record.json").read_text())
    assert 0.99 < compare["perplexity"]["ratio"] < WORST.get(scheme, 1.2)
    if scheme != "Q2_K":  # so small a model at two bits does not find the end of a passage
        assert compare["smoke_failed"] == []
    assert compare["divergence"]["mean"] > 0  # not the baseline over again
    record = json.loads(
        (work.store / "measure" / keys["measure-candidate"] / "record.json").read_text()
    )
    assert record["server"]["name"] == RUN[form, scheme]
    assert ("unpacked" in record) == (
        cannot_serve(RUN[form, scheme], form, scheme, "cpu") is not None
    )
