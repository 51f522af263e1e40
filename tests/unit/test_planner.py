"""Which change of what gives which stages another key, and which stages a recipe has."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from quantize import planner
from quantize.errors import UsageError
from quantize.keys import digest
from quantize.planner import STAGES, plan, with_status
from quantize.resources import shipped_root
from quantize.stages.base import Resolved
from quantize.store import Store
from tests.unit.planning import ALL, BASE, TINY, Tiny, changed, ids, keys, locks

CARD = {"card", "publish"}
COMPARED = {"compare", *CARD}
SERVED = {"measure-baseline", "measure-candidate", "measure-repeat", "measure-base"}
MEASURED = {*SERVED, *COMPARED}
TEXTS = MEASURED - {"measure-base"}  # which is asked the tasks alone
FORM = TEXTS - {"measure-repeat"}
COMPRESSED = {"compress", "audit", "measure-candidate", *COMPARED}
CALIBRATED = {"calibrate", *COMPRESSED}


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("quantize.scheme=W4A16", COMPRESSED),
        ("quantize.group_size=64", COMPRESSED),
        ("quantize.ignore=[lm_head, model.layers.0.mlp.down_proj]", COMPRESSED),
        ("quantize.method=awq+gptq", COMPRESSED),
        ("quantize.dampening=0.05", CARD),  # AWQ reads neither of the two
        ("quantize.activation_order=none", CARD),
        ("calibration.samples=64", CALIBRATED),
        ("calibration.sequence_length=128", CALIBRATED),
        ("calibration.packing=true", CALIBRATED),
        ("calibration.seed=1", CALIBRATED),
        ("calibration.split=test", CALIBRATED),
        ("quantize.group_size=channel", COMPRESSED),
        ("quantize.overrides=[{modules: [lm_head], scheme: FP8_DYNAMIC}]", COMPRESSED),
        ("quantize.overrides=[]", set()),
        ("quantize.kv_cache=fp8", COMPRESSED),
        ("quantize.engine=llmcompressor", COMPRESSED),
        ("quantize.clip=true", COMPRESSED),
        ("quantize.clip=false", set()),
        ("evaluate.margins.perplexity_ratio=1.2", COMPARED),
        ("evaluate.margins.task_drop=0.2", COMPARED),
        ("evaluate.margins.recovery=none", COMPARED),
        ("evaluate.margins.tasks={valley_mc: {drop: 0.1}}", COMPARED),
        ("evaluate.gate.inconclusive=fail", COMPARED),
        ("evaluate.gate.tasks=[valley_qa]", COMPARED),
        ("evaluate.text={text: ../eval/texts/valley.jsonl}", TEXTS),
        ("serve.max_num_seqs=8", MEASURED),
        ("serve.max_model_len=512", MEASURED),
        ("serve.kv_cache_gib=2", MEASURED),
        ("serve.enable_prefix_caching=false", MEASURED),
        ("serve.gpu_memory_utilization=0.5", MEASURED),
        ("serve.extra_args=[--swap-space, '0']", MEASURED),
        ("serve.tensor_parallel_sizes=[1, 2]", CARD),  # preflight's alone, the audit has them
        ("serve.tensor_parallel_sizes=[3]", {"audit", *COMPARED}),
        ("publish.card_template=tiny-llama-fp8.yaml", CARD),  # any file
        ("model.license=mit", CARD),
        ("model.base=examples/tiny_llama/instruct", {*BASE, *COMPARED}),
        ("name=another-name", CARD),
        ("publish.folder=out/elsewhere", {"publish"}),
        ("environments.vllm.python=/usr/bin/python3", set()),  # through the lock digest, below
    ],
)
def test_a_recipe_key_changes_the_stages_that_read_it(
    change: str, expected: set[str], tiny: Tiny
) -> None:
    assert changed(plan(tiny(), locks), plan(tiny(change), locks)) == expected


def test_options_of_gptq_change_gptq(tiny: Tiny) -> None:
    gptq = shipped_root() / "recipes" / "tiny-llama-gptq.yaml"
    before = plan(tiny(recipe=gptq), locks)
    for change in ("quantize.dampening=0.05", "quantize.activation_order=none"):
        assert changed(before, plan(tiny(change, recipe=gptq), locks)) == COMPRESSED


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", set(ALL) - {"fetch-base"}),
        ("base", {*BASE, *COMPARED}),
        ("calibration", CALIBRATED),
        ("suite", MEASURED),
        ("health", FORM),
        ("prompts", FORM),
        ("text", TEXTS),
        ("tasks", MEASURED),
    ],
)
def test_contents_of_an_input_change_the_stages_that_read_it(
    name: str, expected: set[str], tiny: Tiny
) -> None:
    resolved = tiny()
    other = replace(resolved, digests={**resolved.digests, name: "0" * 64})
    assert changed(plan(resolved, locks), plan(other, locks)) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [("vllm", MEASURED), ("lmeval", MEASURED), ("llmcompressor", CALIBRATED)],
)
def test_another_lock_changes_the_stages_that_run_in_it(
    environment: str, expected: set[str], tiny: Tiny
) -> None:
    def newer(name: str) -> str:
        return "newer" if name == environment else locks(name)

    assert changed(plan(tiny(), locks), plan(tiny(), newer)) == expected


def test_a_suite_without_tasks_needs_no_harness(tiny: Tiny) -> None:
    resolved = tiny("evaluate.suite=smoke")
    assert plan(resolved, locks).stage("measure-baseline").environments == ("vllm",)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fetch", set(ALL)),
        ("calibrate", CALIBRATED),
        ("compress", COMPRESSED),
        ("audit", COMPRESSED - {"compress", "measure-candidate"}),
        ("measure", MEASURED),
        ("compare", COMPARED),
        ("card", CARD),
        ("publish", {"publish"}),
    ],
)
def test_a_newer_version_of_a_stage_changes_it_and_what_follows(
    kind: str, expected: set[str], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan(tiny(), locks)
    monkeypatch.setattr(STAGES[kind], "VERSION", STAGES[kind].VERSION + 1)
    assert changed(before, plan(tiny(), locks)) == expected


def test_a_measurement_belongs_to_its_accelerator(tiny: Tiny) -> None:
    assert changed(plan(tiny(), locks), plan(tiny(accelerator="cuda"), locks)) == MEASURED


def test_what_has_no_effect_changes_no_key(tiny: Tiny, tmp_path: Path) -> None:
    """Another file with other comments, at another place, with defaults written out."""
    lines = [line for line in TINY.read_text().splitlines() if not line.startswith("#")]
    other = tmp_path / "mine.yaml"
    other.write_text("# mine\n" + "\n".join(lines) + "\n")
    spelled = tiny("serve.tensor_parallel_size=1", "calibration.packing=false", recipe=other)
    assert changed(plan(tiny(), locks), plan(spelled, locks)) == set()


def test_the_baseline_is_shared_by_the_shipped_recipes(tiny: Tiny) -> None:
    found = sorted((shipped_root() / "recipes").glob("tiny-*.yaml"))
    # That of GGUF is another file, served by another program.
    recipes = [recipe for recipe in found if "format: gguf" not in recipe.read_text()]
    assert len(recipes) > 3
    baselines, candidates = set(), set()
    for recipe in recipes:
        made = keys(plan(tiny(recipe=recipe), locks))
        baselines.add(made["measure-baseline"])
        candidates.add(made["measure-candidate"])
    assert len(baselines) == 1
    assert len(candidates) == len(recipes)


RECIPES = sorted(path.stem for path in (shipped_root() / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_plan_completely(name: str, tiny: Tiny) -> None:
    made = plan(tiny(recipe=shipped_root() / "recipes" / f"{name}.yaml"), locks)
    seen: set[str] = set()
    for entry in made.stages:
        assert set(entry.inputs.values()) <= seen, "a stage comes after its inputs"
        seen.add(entry.id)
        if entry.key is None:  # the base's commit is looked up when it is fetched
            assert "its key is known" in entry.reason
            assert entry.id in {*BASE, *COMPARED}
            continue
        assert entry.key == digest(entry.key_inputs)
        # what a manifest gives back is what went in: nothing changes by being written
        assert json.loads(json.dumps(entry.key_inputs)) == entry.key_inputs
    assert {"fetch", "compress", "audit", "card", "publish"} <= seen
    assert plan(tiny(recipe=shipped_root() / "recipes" / f"{name}.yaml"), locks) == made


# --- which stages --------------------------------------------------------------------------------


def test_another_format_is_one_stage_more_and_no_new_compress(tiny: Tiny) -> None:
    plain, awq = plan(tiny(), locks), plan(tiny("quantize.format=awq"), locks)
    assert [name for name in ids(awq) if name not in ids(plain)] == ["convert"]
    assert ids(awq).index("convert") == ids(awq).index("compress") + 1
    assert awq.stage("convert").inputs == {"fetch": "fetch", "compress": "compress"}
    assert awq.stage("measure-candidate").inputs["model"] == "convert"
    for name in ("audit", "compare", "card", "publish"):
        assert awq.stage(name).inputs["compress"] == "convert", name
    assert awq.stage("card").inputs["quantized"] == "compress"  # whose environment made it
    differ = {name for name, key in keys(plain).items() if keys(awq)[name] != key}
    assert differ == COMPRESSED - {"compress"}
    assert awq.stage("audit").key_inputs["with"]["format"] == "awq"
    assert "format" not in plain.stage("audit").key_inputs["with"]
    named = plan(tiny("quantize.format=compressed-tensors"), locks)
    assert {name for name, key in keys(plain).items() if keys(named)[name] != key} <= CARD
    gptq = plan(tiny("quantize.format=gptq"), locks)
    assert keys(gptq)["compress"] == keys(awq)["compress"]
    assert keys(gptq)["convert"] != keys(awq)["convert"]


def write_recipe(folder: Path, *blocks: str) -> Path:
    path = folder / "recipe.yaml"
    head = ["version: 1", "name: mine", "model: {source: examples/tiny_llama/instruct}"]
    path.write_text("\n".join([*head, *map(textwrap.dedent, blocks)]) + "\n")
    return path


RTN = "quantize: {method: rtn, scheme: W4A16}"
CALIBRATION = "calibration: {source: examples/tiny_llama/calibration.jsonl}"
AWQ = "quantize: {method: awq}\n" + CALIBRATION
KV_CACHE = "quantize: {method: rtn, scheme: W4A16, kv_cache: fp8}\n" + CALIBRATION
MIXED = "quantize: {{method: fp8, overrides: [{{modules: ['re:.*o_proj'], scheme: {scheme}}}]}}"
EVALUATE = "evaluate: {suite: tiny}"
BLOCK = "quantize: {method: fp8, scheme: FP8_BLOCK}"
UNSERVED = BASE | {"measure-repeat"}
UNMEASURED = {*SERVED, *BASE, "compare"}
PUBLISH = "publish: {folder: out}"


@pytest.mark.parametrize(
    ("blocks", "left_out"),
    [
        ([AWQ, EVALUATE, PUBLISH], BASE),
        ([RTN, EVALUATE, PUBLISH], BASE | {"calibrate"}),
        (["quantize: {method: fp8}", EVALUATE, PUBLISH], BASE | {"calibrate"}),
        ([BLOCK, EVALUATE, PUBLISH], UNSERVED | {"calibrate"}),
        ([MIXED.format(scheme="MXFP4A16"), EVALUATE, PUBLISH], UNSERVED | {"calibrate"}),
        ([KV_CACHE, EVALUATE, PUBLISH], BASE),
        ([AWQ, PUBLISH], UNMEASURED),
        ([AWQ, EVALUATE], BASE | {"publish"}),
        ([RTN], UNMEASURED | {"calibrate", "publish"}),
        ([AWQ, "evaluate: {suite: tiny, quick: true}", PUBLISH], BASE | {"measure-repeat"}),
        ([AWQ, "evaluate: {suite: tiny, noise: false}", PUBLISH], BASE | {"measure-repeat"}),
    ],
)
def test_stages_of_a_recipe(
    blocks: list[str], left_out: set[str], tiny: Tiny, tmp_path: Path
) -> None:
    made = plan(tiny(recipe=write_recipe(tmp_path, *blocks)), locks)
    assert ids(made) == tuple(name for name in ALL if name not in left_out)
    assert all(entry.key for entry in made.stages)
    if "calibrate" in left_out:
        assert "calibrate" not in made.stage("compress").inputs
    if "publish" not in left_out:  # the gates must be askable
        assert ("compare" in made.stage("publish").inputs) == ("compare" not in left_out)


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ("name=mine", True),
        ("evaluate.retention=false", False),
        ("evaluate.suite=smoke", False),  # no tasks
        ("quantize={method: fp8, scheme: FP8_BLOCK}", False),  # nothing to hold it against
    ],
)
def test_the_base_is_measured_for_retention(change: str, measured: bool, tiny: Tiny) -> None:
    made = plan(tiny(change), locks)
    assert (set(ids(made)) >= BASE) == measured
    assert ("base" in made.stage("compare").inputs) == measured
    if measured:
        assert made.stage("measure-base").inputs == {"fetch": "fetch", "model": "fetch-base"}


@pytest.mark.parametrize("key", ["margins.tasks={other: {drop: 0.1}}", "gate.tasks=[other]"])
def test_margins_and_gate_name_tasks_of_the_suite(key: str, tiny: Tiny) -> None:
    with pytest.raises(
        UsageError, match=r"names 'other', and suite tiny has no such task"
    ) as found:
        tiny(f"evaluate.{key}")
    assert found.value.hint == "its tasks: valley_mc, valley_qa"


def test_a_calibration_block_that_nobody_reads_changes_nothing_made(
    tiny: Tiny, tmp_path: Path
) -> None:
    block = CALIBRATION
    without = plan(tiny(recipe=write_recipe(tmp_path, RTN, EVALUATE, PUBLISH)), locks)
    with_it = plan(tiny(recipe=write_recipe(tmp_path, RTN, EVALUATE, PUBLISH, block)), locks)
    assert changed(without, with_it) <= CARD


@pytest.mark.parametrize(
    ("block", "accelerator", "noted"),
    [
        ("quantize: {method: fp8}", "cpu", ""),
        ("quantize: {method: fp8, scheme: FP8_BLOCK}", "cpu", "the result is not served here"),
        ("quantize: {method: fp8, scheme: FP8_BLOCK}", "cuda", ""),
        (MIXED.format(scheme="W4A16, group_size: 32"), "cpu", ""),
        (MIXED.format(scheme="W8A16"), "cpu", "the result is not served here"),
        ("quantize: {method: rtn, scheme: W8A16}", "cpu", "the weights are unpacked to BF16"),
        ("quantize: {method: rtn, scheme: W8A16}", "cuda", ""),
        (MIXED.format(scheme="W8A16"), "cuda", ""),
    ],
)
def test_what_is_not_served_here_is_said(
    block: str,
    accelerator: str,
    noted: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
    recipe = write_recipe(tmp_path, block, EVALUATE)
    made = plan(tiny(recipe=recipe, accelerator=accelerator), locks)
    assert bool(made.notes) == bool(noted)
    if noted:
        (note,) = made.notes
        assert note.startswith(f"measure-candidate: {noted}")
        assert "vLLM's CPU backend has no" in note
        assert "measure-candidate" in ids(made)  # the rest of the run still works
    nothing_measured = write_recipe(tmp_path, block)
    assert plan(tiny(recipe=nothing_measured, accelerator=accelerator), locks).notes == ()


def test_a_processor_without_avx512_measures_four_bits_unpacked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, "quantize: {method: rtn}", EVALUATE)
    keys = {}
    for has in (True, False):
        monkeypatch.setattr("quantize.servers.cpu_has", lambda _flag, has=has: has)
        made = plan(tiny(recipe=recipe, accelerator="cpu"), locks)
        keys[has] = {entry.id: entry.key for entry in made.stages}
    (note,) = made.notes
    assert "unpacked to BF16" in note
    assert "AVX-512" in note
    changed = {stage for stage in keys[True] if keys[True][stage] != keys[False][stage]}
    assert "measure-candidate" in changed  # another measurement
    assert not changed & {"compress", "audit", "measure-baseline", "measure-repeat"}


def test_an_adapter_is_merged_in_an_environment(tiny: Tiny, tmp_path: Path) -> None:
    alone = plan(tiny(), locks)
    assert alone.stage("fetch").environments == ()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text(name)
    resolved = tiny(f"model.adapter={tmp_path}")
    merged = plan(resolved, locks)
    assert merged.stage("fetch").environments == ("llmcompressor",)
    assert merged.stage("fetch-base").environments == ()  # as it is
    assert changed(alone, merged) == set(ALL) - {"fetch-base"}
    other = replace(resolved, digests={**resolved.digests, "adapter": "0" * 64})
    assert changed(merged, plan(other, locks)) == set(ALL) - {"fetch-base"}


# --- what cannot be known offline ----------------------------------------------------------------


def test_an_unpinned_model_leaves_everything_pending(tiny: Tiny, tmp_path: Path) -> None:
    made = with_status(plan(tiny("model.source=owner/name"), locks), Store(tmp_path))
    pending = {entry.id for entry in made.stages if entry.status == "pending"}
    assert pending == set(ALL) - {"fetch-base"}
    assert pending == {entry.id for entry in made.stages if entry.key is None}
    assert made.stage("fetch").reason == "its key is known when model is resolved"
    assert made.stage("calibrate").reason == "its key is known after fetch"
    assert made.stage("audit").reason == "its key is known after compress, fetch"
    commit = "0123456789abcdef" * 2 + "01234567"
    pinned = plan(tiny("model.source=owner/name", f"model.revision={commit}"), locks)
    assert all(entry.key for entry in pinned.stages)


def test_unpinned_data_leave_what_follows_pending(tiny: Tiny, tmp_path: Path) -> None:
    made = with_status(plan(tiny("calibration.source=owner/data"), locks), Store(tmp_path))
    assert {entry.id for entry in made.stages if entry.status == "pending"} == CALIBRATED
    assert made.stage("calibrate").reason == "its key is known when calibration is resolved"
    assert keys(made)["measure-baseline"] == keys(plan(tiny(), locks))["measure-baseline"]


def test_a_mistake_in_a_stage_is_not_taken_for_pending(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, object]:
        raise AttributeError("a bug")

    broken = SimpleNamespace(VERSION=1, environments=lambda *_: (), key_inputs=key_inputs)
    monkeypatch.setitem(STAGES, "audit", broken)
    with pytest.raises(AttributeError):
        plan(tiny(), locks)


def test_every_stage_offers_what_the_planner_asks_for() -> None:
    for kind, stage in planner.STAGES.items():
        assert isinstance(stage, ModuleType), kind
        assert isinstance(stage.VERSION, int)
        assert callable(stage.run)
