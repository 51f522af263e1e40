"""The streaming engine's algebra and files against oracles that do not use it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, environment

pytestmark = pytest.mark.end_to_end

CHECKS = (
    # llm-compressor's own `quantize_weight` on the same weight, H and scales
    "gptq_w4a16_g128",
    "gptq_w4a16_asym_g32",
    "gptq_w4a16_channel",
    "gptq_w8a16_g128",
    "gptq_w8a8",
    "gptq_fp8_channel",
    "gptq_fp8_block",
    "gptq_nvfp4",
    "gptq_mxfp4",
    "gptq_dead_columns",
    "gptq_products_in_bf16",
    "gptq_stacked",
    "gptq_indefinite",
    "gptq_untouched",
    # a CUDA graph and the loop that it was recorded from
    "gptq_recorded",
    # packed and unpacked linears on the tokens themselves, in float64
    "awq_search_w4a16_asym",
    "awq_search_w4a16",
    "awq_search_channel",
    "awq_search_gemma",
    "awq_search_sampled",
    "awq_probed",
    "awq_clip_groups",
    "awq_clip_symmetric",
    "awq_clip_channel",
    "awq_unchanged_llama",
    "awq_unchanged_gemma",
    "sensitivity",
    # every linear's inputs, kept by a hook of our own
    "inputs_gram_matrices",
    "inputs_nothing_seen",
    "watch_a_layer",
    "watch_layer_ends",
    # files, cut and damaged
    "hidden_sequences",
    "hidden_states",
    "hidden_states_held",
    "hidden_states_kept",
    "hidden_states_far_apart",
    "journal_torn",
    "journal_forgets",
    "journal_foreign",
    "journal_shards",
)


@pytest.fixture(scope="module")
def report(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("algebra") / "report.json"
    python = environment_python("llmcompressor")
    command = [str(python), "-m", "tests.end_to_end.engine_algebra", str(path)]
    subprocess.run(
        command, cwd=ROOT, env=environment(), check=True, timeout=1100, stdout=sys.stderr
    )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_no_check_is_left_out(report: dict[str, Any]) -> None:
    assert sorted(report) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_algebra(name: str, report: dict[str, Any]) -> None:
    assert report[name]["ok"], report[name]["failure"]
    figures = report[name]["figures"]
    if "skipped" in figures:
        pytest.skip(figures["skipped"])
    print(json.dumps(figures, indent=1))
