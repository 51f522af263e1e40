"""What the Hub reads: front matter with model-index, and results of registered benchmarks."""

import copy

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from records_fixture import baseline_side, candidate_side, card_inputs, new_store, stage_context

from quantize.report.card import eval_results, render_card
from quantize.report.card_metadata import BENCHMARKS, front_matter_values
from quantize.stages import card as stage


@pytest.fixture
def record(tmp_path):
    store = new_store(tmp_path)
    inputs = card_inputs(store, baseline_side(), candidate_side())
    return stage.build_record(stage_context(tmp_path, store, "card", inputs))


def test_the_hubs_client_reads_the_results(record):
    data = ModelCard(render_card(record)).data
    assert data.model_name == "tiny-llama-awq"
    compare = record["compare"]
    expected = {
        ("valley", "valley.jsonl", "perplexity"): compare["perplexity"]["candidate"],
        ("valley_mc", "valley_mc", "accuracy"): compare["tasks"][0]["candidate"],
        ("valley_qa", "valley_qa", "exact_match"): compare["tasks"][1]["candidate"],
    }
    found = {
        (one.dataset_type, one.dataset_name, one.metric_type): one.metric_value
        for one in data.eval_results
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=5e-5)
    baseline = compare["tasks"][0]["baseline"]
    assert f"acc (BF16: {baseline:g})" in {one.metric_name for one in data.eval_results}
    assert {one.task_type for one in data.eval_results} == {"text-generation"}


def test_the_hubs_client_writes_the_same_again(record):
    """A tool that edits the card's metadata loses nothing of it."""
    values = front_matter_values(record)
    again = ModelCardData(**copy.deepcopy(values))
    written = yaml.safe_load(again.to_yaml())
    assert model_index_to_eval_results(written["model-index"]) == model_index_to_eval_results(
        values["model-index"]
    )
    assert {**written, "model-index": 0} == {**values, "model-index": 0}


def test_data_sets_of_the_hub_are_named_by_their_ids(record):
    text = {"path": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}
    record["candidate"]["perplexity"] |= {"text": "Salesforce/wikitext", "dataset": text}
    record["candidate"]["tasks"][0]["dataset"] = {"path": "json", "split": "test"}
    record["candidate"]["tasks"][1] |= {
        "dataset": {"path": "openai/gsm8k", "config": "main", "split": "test"},
        "num_fewshot": 8,
    }
    datasets = [
        result["dataset"] for result in front_matter_values(record)["model-index"][0]["results"]
    ]
    assert datasets == [
        {
            "name": "Salesforce/wikitext",
            "type": "Salesforce/wikitext",
            "config": "wikitext-2-raw-v1",
            "split": "test",
        },
        {
            "name": "valley_mc",
            "type": "valley_mc",
            "split": "test",
            "args": {"num_few_shot": 0},
        },
        {
            "name": "valley_qa",
            "type": "openai/gsm8k",
            "config": "main",
            "split": "test",
            "args": {"num_few_shot": 8},
        },
    ]


def test_nothing_measured_is_no_result(record):
    del record["compare"]
    assert "model-index" not in front_matter_values(record)
    assert eval_results(record) == {}


@pytest.mark.parametrize(
    ("terms", "files", "kept"),
    [
        (
            {"license_name": "acme-1", "license_link": "https://acme.example/licence"},
            (),
            {"license_name": "acme-1", "license_link": "https://acme.example/licence"},
        ),
        ({"license_link": "LICENSE"}, ("LICENSE",), {"license_link": "LICENSE"}),
        ({"license_link": "LICENSE"}, (), {}),  # it would lead nowhere
        ({"license_link": "javascript:alert(1)"}, (), {}),
        ({"license_link": "config.json"}, ("config.json",), {}),
        (
            {"extra_gated_prompt": "By this you agree:\n---\n- to all"},
            (),
            {"extra_gated_prompt": "By this you agree:\n---\n- to all"},
        ),
    ],
)
def test_licence_and_terms_go_on(record, terms, files, kept):
    record["source"] |= {"license": "other", "licence_terms": terms}
    record["source"]["files"] += [{"name": name, "bytes": 1, "sha256": ""} for name in files]
    data = ModelCard(render_card(record)).data
    assert data.license == "other"
    found = {key: data.get(key) for key in ("license_name", "license_link", "extra_gated_prompt")}
    assert {key: value for key, value in found.items() if value} == kept


# --- .eval_results


def as_gsm8k(record):
    """The record with its second task turned into GSM8K, asked in full."""
    for block in ("compare", "candidate"):
        record[block]["tasks"][1] |= {"name": "gsm8k_cot_llama", "documents": 1319}
    record["candidate"]["tasks"][1] |= {
        "dataset": {"path": "openai/gsm8k", "config": "main", "split": "test"},
        "num_fewshot": 8,
    }
    record["compare"]["tasks"][1] |= {"baseline": 0.8453, "candidate": 0.8344}
    return record


def test_a_registered_benchmark_has_a_file(record):
    ((name, text),) = eval_results(as_gsm8k(record)).items()
    assert name == "gsm8k_cot_llama.yaml"
    assert yaml.safe_load(text) == [
        {
            "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
            "value": 83.44,
            "notes": "lm-eval gsm8k_cot_llama, 8-shot, chat template; AWQ, W4A16_ASYM, "
            "group size 128; BF16: 84.53",
        }
    ]


def test_the_hubs_client_reads_the_file(record):
    hub = pytest.importorskip("huggingface_hub._eval_results")  # of 1.x the later ones
    (text,) = eval_results(as_gsm8k(record)).values()
    (entry,) = hub.parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 83.44)
    assert hub.eval_result_entries_to_yaml([entry]) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "change",
    [
        {"documents": 200},  # a part of it
        {"metric": "acc"},
        {"name": "valley_qa"},  # a private task on its data
    ],
)
def test_another_measurement_is_no_result_of_the_benchmark(record, change):
    as_gsm8k(record)["compare"]["tasks"][1] |= change
    if "name" in change:
        record["candidate"]["tasks"][1] |= change
    assert eval_results(record) == {}


def test_other_data_are_no_result_of_the_benchmark(record):
    as_gsm8k(record)["candidate"]["tasks"][1]["dataset"] = {"path": "json"}
    assert eval_results(record) == {}


def test_the_table_of_benchmarks_is_sound():
    for task, benchmark in BENCHMARKS.items():
        assert task.startswith(benchmark.task_id)
        assert benchmark.documents > 0
