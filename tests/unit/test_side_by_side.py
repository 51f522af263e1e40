"""`quantize compare`: the table of several results, from their records."""

import json
import os
import re
import subprocess
import sys

import pytest
import report_fixture as fixture
from records_fixture import artifact

from quantize.errors import UsageError
from quantize.reporting import compare
from quantize.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def result(store, key, name, **compress):
    record = fixture.worse_card() if name == "worse" else fixture.card()
    record["recipe"]["name"] = name
    record["compress"] |= compress
    return artifact(store, "card", key * 64, {"record.json": record}, recipe=name)


def cells(found, label):
    return next(line.cells for line in found.lines if line.label == label)


def test_the_figures_are_those_of_the_records(store):
    result(store, "a", "ours", engine="stream", seconds=12.5, peak_memory_bytes=2_000_000_000)
    result(store, "b", "worse", engine="gptqmodel", seconds=61.0)
    found = compare(["ours", "worse"], store)
    assert found.names == ("ours", "worse")
    assert cells(found, "Engine") == ("stream", "gptqmodel")
    assert cells(found, "Time to quantize") == ("12.5 s", "61.0 s")
    memory = cells(found, "Peak memory of quantizing")
    assert memory[0] == "2.00 GB"
    kl = fixture.card()["compare"]["divergence"]
    assert cells(found, "KL divergence, mean (nats)")[0].startswith(f"{kl['mean']:.5f} (")
    ratio = fixture.card()["compare"]["perplexity"]["ratio"]
    assert cells(found, "Perplexity")[0].startswith(f"×{ratio:.4f} (")
    verdicts = cells(found, "Verdict")
    assert verdicts[0] != verdicts[1]
    assert "valley_qa" in {line.label for line in found.lines}


def test_what_was_not_measured_is_an_empty_cell_and_a_remark(store):
    record = fixture.card()
    for block in ("compare", "baseline", "candidate"):
        del record[block]
    record["recipe"]["name"] = "unmeasured"
    artifact(store, "card", "c" * 64, {"record.json": record}, recipe="unmeasured")
    result(store, "a", "ours")
    found = compare(["ours", "unmeasured"], store)
    assert cells(found, "Perplexity")[1] == ""
    assert cells(found, "Verdict")[1] == "not measured"
    assert any("unmeasured: its quality was not measured" in remark for remark in found.remarks)


def test_one_result_is_no_comparison(store):
    result(store, "a", "ours")
    with pytest.raises(UsageError, match="one result"):
        compare(["ours"], store)


def test_the_command_prints_the_table_and_writes_the_page(store, tmp_path):
    result(store, "a", "ours", engine="stream", seconds=12.5)
    result(store, "b", "worse", engine="gptqmodel", seconds=61.0)
    command = [sys.executable, "-m", "quantize", "compare", "ours", "worse"]
    command += ["--store", str(store.root)]
    env = os.environ | {"COLUMNS": "140", "NO_COLOR": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert re.search(r"Time to quantize +12\.5 s +61\.0 s", shown)
    page = tmp_path / "page.html"
    command += ["--json", "-o", str(page)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [one["name"] for one in said["results"]] == ["ours", "worse"]
    assert said["results"][1]["Time to quantize"] == "61.0 s"
    text = page.read_text(encoding="utf-8")
    assert "gptqmodel" in text
    assert "61.0 s" in text or "61 s" in text
