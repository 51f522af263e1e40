"""`quantize search` on the engine's own record, and the recipe that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Work

pytestmark = pytest.mark.end_to_end

BUDGET_BITS = 5.0


def test_the_recipe_that_search_writes_is_of_the_size_that_was_asked_for(
    work: Work, tmp_path: Path
) -> None:
    recipe = tmp_path / "mixed.yaml"
    asked = ["search", "tiny-llama-awq-gptq", "--budget", f"{BUDGET_BITS}bits"]
    done = work.quantize(*asked, "--output", str(recipe), "--store", str(work.store))
    assert done.code == 0, done.err
    assert (tmp_path / "mixed.frontier.png").stat().st_size > 10_000
    done = work.quantize(
        "run", str(recipe), "--until", "audit", "--store", str(work.store), "--json"
    )
    assert done.code == 0, done.err
    made = Path(done.json()["places"]["artifact"])
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    record = json.loads((made.parent / "sensitivity.json").read_text())
    shapes = {linear["name"]: linear["shape"] for linear in record["linears"]}
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert len(shapes) == 28 and record["tokens"] > 0
    outside = 2 * 2 * 2048 * 256  # embeddings and head, BF16
    weights = index["metadata"]["total_size"] - outside
    bits = 8 * weights / sum(rows * columns for rows, columns in shapes.values())
    # Norms and the shapes that packed weights carry are beside the scales: some kilobytes.
    assert BUDGET_BITS - 0.25 < bits <= BUDGET_BITS + 0.05
