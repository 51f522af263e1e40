"""An adapter that is kept apart: its stage, who depends on it, how it is served and published."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from records_fixture import RECIPE, artifact, baseline_side, candidate_side, card_inputs, new_store

from quantize.checklist import preflight
from quantize.checkpoint import chat_template, read_checkpoint
from quantize.errors import RecipeError, ResourceError, SourceError
from quantize.keys import tree_sha256
from quantize.measure.scope import scope
from quantize.measure.serving import _adapter, _tokenizer
from quantize.plan import Plan, StageEntry
from quantize.planner import plan
from quantize.progress import LineView, Progress
from quantize.recipe import Recipe
from quantize.recipe_file import load_recipe
from quantize.resolve import resolve
from quantize.resources import shipped_root
from quantize.runner import Runner
from quantize.servers import SERVERS, vllm
from quantize.servers.base import Launch, ServedAdapter
from quantize.stages import adapter, card, publish
from quantize.stages.audit import check_kept_adapter
from quantize.stages.base import Resolved, StageContext
from quantize.store import Artifact, Store
from tests.unit.adapters import write_adapter
from tests.unit.checkpoints import TEMPLATE, recipe, write_checkpoint, write_json

EXAMPLES = shipped_root() / "examples" / "tiny_llama"
TINY = shipped_root() / "recipes" / "tiny-llama-gptq.yaml"
PAIR = (f"model.source={EXAMPLES / 'base'}", f"model.adapter={EXAMPLES / 'lora'}")
APART = (*PAIR, "model.adapter_mode=separate")


def planned(tmp_path: Path, *overrides: str) -> Plan:
    made = load_recipe(TINY, overrides)
    resolved = resolve(made, TINY, "cpu", online=False, cache_path=tmp_path / "hashes.json")
    return plan(resolved, lambda name: name)


def test_who_depends_on_it(tmp_path: Path) -> None:
    apart, merged = planned(tmp_path, *APART), planned(tmp_path, *PAIR)
    alone = planned(tmp_path, PAIR[0])
    by_id = {entry.id: entry for entry in apart.stages}
    assert list(by_id)[:3] == ["fetch", "fetch-adapter", "calibrate"]
    with_adapter = {name for name, entry in by_id.items() if "adapter" in entry.inputs}
    assert with_adapter == {
        *("calibrate", "audit", "measure-baseline", "measure-candidate", "measure-repeat"),
        *("measure-base", "compare", "card", "publish"),
    }
    assert "adapter" not in by_id["compress"].inputs
    assert apart.stage("fetch").key == alone.stage("fetch").key != merged.stage("fetch").key
    assert apart.stage("fetch").environments == ()
    assert "fetch-adapter" not in {entry.id for entry in merged.stages}
    assert merged.stage("fetch").environments == ("llmcompressor",)
    assert apart.stage("measure-baseline").key != alone.stage("measure-baseline").key


def test_another_adapter_leaves_a_data_free_base_as_it_is(tmp_path: Path) -> None:
    free = ("quantize.method=rtn",)
    base = read_checkpoint(EXAMPLES / "base")
    other = write_adapter(tmp_path / "other", base)
    first = planned(tmp_path, *APART, *free)
    second = planned(tmp_path, *APART, *free, f"model.adapter={other}")
    same = {e.id for e in first.stages if e.key == second.stage(e.id).key}
    assert same == {"fetch", "compress", "fetch-base"}


def test_a_mode_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="adapter_mode without adapter"):
        load_recipe(TINY, ["model.adapter_mode=separate"])


def context(tmp_path: Path, base: Path, folder: Path) -> StageContext:
    """The stage's context as the executor makes it, for a local base and adapter."""
    store = new_store(tmp_path)
    given = recipe(model={"source": str(base), "adapter": str(folder), "adapter_mode": "separate"})
    names = ["adapter_config.json", "adapter_model.safetensors"]
    digests = {"adapter": tree_sha256(folder, names)}
    files, work = tmp_path / "files", tmp_path / "work"
    files.mkdir(parents=True)
    work.mkdir()
    fetched = artifact(store, "fetch", "f" * 64, {"source.json": {"folder": str(base)}})
    return StageContext(
        entry=StageEntry("fetch-adapter", "adapter", "a" * 64, {}),
        resolved=Resolved(given, tmp_path, "cpu", digests, {"adapter": folder, "model": base}),
        inputs={"fetch": fetched},
        files=files,
        work=work,
        runner=Runner(None, tmp_path, Progress(LineView([].append))),  # type: ignore[arg-type]
        store=store,
    )


def made(tmp_path: Path, **files: str) -> tuple[StageContext, dict[str, Any]]:
    base = write_checkpoint(tmp_path / "checkpoint")
    folder = write_adapter(tmp_path / "adapter", read_checkpoint(base))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    (folder / "README.md").write_text("# The adapter's own card\n")
    given = context(tmp_path, base, folder)
    adapter.run(given)
    return given, json.loads((given.files / "adapter.json").read_text())


def test_it_is_copied_as_it_is(tmp_path: Path) -> None:
    given, said = made(tmp_path)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert [entry["name"] for entry in said["files"]] == names
    assert tree_sha256(given.files / "adapter", names) == given.resolved.digests["adapter"]
    assert said["rank"] == 4
    assert said["modules"] == 6
    assert said["targets"] == ["down_proj", "q_proj", "v_proj"]
    assert said["trained_on"] == "somewhere/checkpoint"
    assert said["tokenizer"] is False
    assert given.notes == []


def test_the_pairs_tokenizer_is_complete(tmp_path: Path) -> None:
    given, said = made(tmp_path, tokenizer__json='{"model": {"vocab": {"z": 0}}}')
    assert said["tokenizer"] is True
    output = given.files / "adapter"
    assert json.loads((output / "tokenizer.json").read_text())["model"]["vocab"] == {"z": 0}
    assert chat_template(output) == TEMPLATE  # the base's: the adapter has none
    assert not (output / "tokenizer.model").exists()  # that would be another tokenizer


def test_a_chat_template_alone_gets_the_bases_tokenizer(tmp_path: Path) -> None:
    given, said = made(tmp_path, chat_template__jinja="what it was trained with")
    assert said["tokenizer"] is True
    output = given.files / "adapter"
    base = tmp_path / "checkpoint"
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert chat_template(output) == "what it was trained with"


def test_an_adapter_that_changes_under_the_run(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "checkpoint")
    folder = write_adapter(tmp_path / "adapter", read_checkpoint(base))
    given = context(tmp_path, base, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"lora_alpha": 16})
    with pytest.raises(SourceError, match="changed after the run began"):
        adapter.run(given)


def stored(tmp_path: Path, store: Store, *, tokenizer: bool = True) -> Artifact:
    """A fetch-adapter artifact as the stage leaves it."""
    files = {"tokenizer__json": "{}"} if tokenizer else {}
    given, said = made(tmp_path / "making", **files)
    contents = {
        f"adapter/{path.name}": path.read_bytes() for path in (given.files / "adapter").iterdir()
    }
    return artifact(store, "adapter", "a" * 64, {"adapter.json": said, **contents})


def test_the_audit_sees_a_changed_file(tmp_path: Path) -> None:
    kept = stored(tmp_path, new_store(tmp_path))
    source = read_checkpoint(tmp_path / "making" / "checkpoint")
    check = check_kept_adapter(kept, source)
    assert check.passed
    assert check.detail == "4 files as fetched"
    write_json(kept.path / "adapter" / "tokenizer.json", {"a": 1})
    assert check_kept_adapter(kept, source).detail == "tokenizer.json differs"


def test_requests_reach_the_adapter(tmp_path: Path) -> None:
    """Baseline and candidate are asked with it, the model it was trained from is not."""
    kept = stored(tmp_path, new_store(tmp_path))
    tiny = load_recipe(TINY, APART)
    resolved = resolve(tiny, TINY, "cpu", online=False, cache_path=tmp_path / "hashes.json")
    given = context(tmp_path, tmp_path / "making/checkpoint", tmp_path / "making/adapter")
    given.resolved, given.inputs = resolved, {**given.inputs, "adapter": kept}
    folder = kept.path / "adapter"
    for stage_id in ("measure-baseline", "measure-candidate", "measure-repeat"):
        asked = scope(resolved, stage_id)
        assert _adapter(given, asked) == ServedAdapter(
            "model", folder, 4, ("down_proj", "q_proj", "v_proj")
        )
        assert _tokenizer(given, asked, SERVERS["vllm"]) == folder
    base = scope(resolved, "measure-base")
    assert _adapter(given, base) is None
    assert _tokenizer(given, base, SERVERS["vllm"]) == folder


@pytest.mark.parametrize(("rank", "largest"), [(1, "1"), (4, "8"), (16, "16"), (200, "256")])
def test_the_servers_command(rank: int, largest: str) -> None:
    launch = Launch(
        program=Path("python"),
        model=Path("/models/base"),
        served_name="base",
        port=1,
        accelerator="cpu",
        serve=recipe().serve,
        max_logprobs=1,
    )
    plain = vllm.command(launch)
    assert "--enable-lora" not in plain
    served = replace(
        launch, adapter=ServedAdapter("model", Path("/an adapter"), rank, ("q_proj", "k_proj"))
    )
    words = vllm.command(served)
    start = words.index("--enable-lora")
    added = words[start : start + 8]
    assert added == [
        *("--enable-lora", "--lora-modules", "model=/an adapter", "--max-lora-rank", largest),
        *("--lora-target-modules", "q_proj", "k_proj"),
    ]
    assert words[:start] + words[start + 8 :] == plain


PAIR_RECIPE: dict[str, Any] = RECIPE | {
    "model": {"source": "acme/base", "adapter": "/home/someone/lora", "adapter_mode": "separate"}
}


def carded(tmp_path: Path, *, tokenizer: bool) -> tuple[dict[str, Any], str, dict[str, Artifact]]:
    store = new_store(tmp_path)
    inputs = card_inputs(store, baseline_side(), candidate_side())
    kept = stored(tmp_path, store, tokenizer=tokenizer)
    inputs["adapter"] = kept
    given = context(tmp_path, tmp_path / "making/checkpoint", tmp_path / "making/adapter")
    given.inputs = inputs
    given.resolved = replace(
        given.resolved, recipe=Recipe.model_validate_json(json.dumps(PAIR_RECIPE))
    )
    card.run(given)
    record = json.loads((given.files / "record.json").read_text())
    return record, (given.files / "README.md").read_text(), inputs


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_card_says_how_to_serve_the_pair(tmp_path: Path, tokenizer: bool) -> None:
    record, text, _ = carded(tmp_path, tokenizer=tokenizer)
    name = record["recipe"]["name"]
    assert record["adapter"]["rank"] == 4
    command = text.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    words = shlex.split(command.splitlines()[-1])
    assert words[:3] == ["vllm", "serve", f"./{name}"]
    assert words[words.index("--lora-modules") + 1] == f"{name}-adapter=./{name}/adapter"
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert ("--tokenizer" in words) == tokenizer
    assert "PeftModel.from_pretrained(base," in text
    assert "Measured and served with: the LoRA adapter" in text
    assert "Merged into it" not in text
    assert "/home/someone" not in text + json.dumps(record)


def test_it_is_published_beside_the_base(tmp_path: Path) -> None:
    record, text, inputs = carded(tmp_path, tokenizer=True)
    store = new_store(tmp_path / "again")
    given = context(tmp_path / "again", tmp_path / "making/checkpoint", tmp_path / "making/adapter")
    made_card = {"record.json": record, "README.md": text.encode()}
    given.inputs = {
        "compress": inputs["compress"],
        "adapter": inputs["adapter"],
        "card": artifact(store, "card", "c" * 64, made_card),
    }
    files = publish.collect(given)
    names = {entry.name for entry in files.entries}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert "adapter/tokenizer.json" in names
    listed = json.loads(files.paths["quantize/manifest.json"].read_text())["files"]
    assert {entry["name"] for entry in listed} == names - {"quantize/manifest.json"}
    for entry in files.entries:
        assert files.paths[entry.name].stat().st_size == entry.bytes


def test_memory_of_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging holds the checkpoint and a layer of it in FP32; keeping apart does not."""
    base = write_checkpoint(tmp_path / "checkpoint")
    checkpoint = read_checkpoint(base)
    folder = write_adapter(tmp_path / "adapter", checkpoint)
    total = checkpoint.weight_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": total})())

    def check(mode: str) -> None:
        model = {"source": "checkpoint", "adapter": "adapter", "adapter_mode": mode}
        given = recipe(model=model, quantize={"method": "rtn", "group_size": 32})
        paths = {"model": base, "adapter": folder}
        preflight(Resolved(given, tmp_path, "cpu", {}, paths), tmp_path, {"fetch"})

    with pytest.raises(ResourceError, match=r"fetch needs .* one layer in FP32"):
        check("merge")
    check("separate")
