"""The fetch stage: a local folder in place, a Hub snapshot, and what surrounds a merge."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    TEMPLATE,
    edit_json,
    llama_tensors,
    recipe,
    write_checkpoint,
    write_json,
)
from hub_fixture import TOKEN, hub_server, online
from records_fixture import artifact, new_store

from quantize.checkpoint import chat_template, model_folder, read_checkpoint
from quantize.errors import SourceError
from quantize.keys import file_sha256, tree_sha256
from quantize.model_files import checkpoint_files
from quantize.plan import StageEntry
from quantize.progress import LineView, Progress
from quantize.recipe import Recipe
from quantize.runner import Runner
from quantize.stages import fetch
from quantize.stages.base import Resolved, StageContext
from tests.hub_server import HubServer
from tests.hub_server.state import File

CARD = "---\nlicense: apache-2.0\nlanguage: [en, no]\nbase_model: [acme/base]\n"
CARD += "license_name: acme-1\nextra_gated_prompt: Agree.\nextra_gated_fields: {x: text}\n"
CARD += "---\n# A model\n"


def context(tmp_path: Path, resolved: Resolved) -> StageContext:
    files, work = tmp_path / "files", tmp_path / "work"
    files.mkdir()
    work.mkdir(exist_ok=True)
    return StageContext(
        entry=StageEntry(id="fetch", kind="fetch", key="f" * 64, key_inputs={}),
        resolved=resolved,
        inputs={},
        files=files,
        work=work,
        runner=Runner(None, tmp_path, Progress(LineView([].append))),  # type: ignore[arg-type]
        store=new_store(tmp_path),
    )


def local(folder: Path, given: Recipe | None = None, **paths: Path) -> Resolved:
    digests = {"model": tree_sha256(folder, checkpoint_files(folder))}
    return Resolved(given or recipe(), folder, "cpu", digests, {"model": folder, **paths})


def source_json(context: StageContext) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((context.files / "source.json").read_text())
    return value


def test_a_local_folder_is_referenced_and_hashed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    (folder / "README.md").write_text(CARD)
    (folder / "optimizer.pt").write_bytes(b"not part of it")
    stage = context(tmp_path, local(folder))
    fetch.run(stage)
    source = source_json(stage)
    assert (source["kind"], source["folder"]) == ("folder", str(folder))
    assert {file["name"]: file["sha256"] for file in source["files"]} == {
        name: file_sha256(folder / name) for name in checkpoint_files(folder)
    }
    assert source["parameters"] == sum(bits.size for _, bits in llama_tensors().values())
    assert source["weight_bytes"] == 2 * source["parameters"]
    assert source["architecture"] == "LlamaForCausalLM"
    assert (source["license"], source["languages"]) == ("apache-2.0", ["en", "no"])
    assert source["base_model"] == "acme/base"
    assert source["chat_template"] is True
    assert source["licence_terms"] == {"license_name": "acme-1", "extra_gated_prompt": "Agree."}
    config = json.loads((folder / "config.json").read_text())
    assert source["attention"]["layers"] == config["num_hidden_layers"]
    assert [path.name for path in stage.files.iterdir()] == ["source.json"]


def test_an_artifact_leads_to_the_folder(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    there = artifact(store, "fetch", "a", {"source.json": {"folder": "/data/checkpoint"}})
    here = artifact(store, "fetch", "b", {"source.json": {"folder": "model"}, "model/x": b""})
    ours = artifact(store, "compress", "c", {"model/x": b""})
    assert model_folder(there) == Path("/data/checkpoint")
    assert model_folder(here) == here.path / "model"
    assert model_folder(ours) == ours.path / "model"


def test_a_folder_that_changed_after_the_plan_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    stage = context(tmp_path, local(folder))
    edit_json(folder / "generation_config.json", {"temperature": 1.5})
    with pytest.raises(SourceError, match="changed after the run began"):
        fetch.run(stage)


def test_a_checkpoint_that_does_not_fit_the_recipe_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    given = recipe(quantize={"method": "awq", "group_size": 48})
    with pytest.raises(SourceError, match="group size 48"):
        fetch.run(context(tmp_path, local(folder, given)))


def test_the_key_is_of_contents_and_the_place_makes_it_stale(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first")
    second = write_checkpoint(tmp_path / "second")
    assert fetch.key_inputs(local(first), "fetch") == fetch.key_inputs(local(second), "fetch")
    stage = context(tmp_path, local(first))
    fetch.run(stage)
    made = artifact(stage.store, "fetch", "f", {"source.json": source_json(stage)})
    assert fetch.stale(local(first), "fetch", made) is None
    assert str(second) in (fetch.stale(local(second), "fetch", made) or "")
    edit_json(second / "config.json", {"vocab_size": 97})
    assert fetch.key_inputs(local(first), "fetch") != fetch.key_inputs(local(second), "fetch")


def seed(server: HubServer, folder: Path, drop: str = "") -> str:
    """A public repository with the files of `folder`; its commit."""
    repo = server.hub.create("model", "acme/tiny", private=False)
    tree = {
        path.name: File(path.read_bytes(), lfs=path.suffix == ".safetensors")
        for path in folder.iterdir()
        if path.name != drop
    }
    return repo.commit("main", tree, "a checkpoint")


def from_hub(commit: str) -> Resolved:
    return Resolved(recipe("acme/tiny"), Path(), "cpu", {"model": f"acme/tiny@{commit}"})


def test_a_hub_snapshot_becomes_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    (folder / "README.md").write_text(CARD)
    (folder / "consolidated.safetensors").write_bytes(b"the same again, elsewhere")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        commit = seed(server, folder)
        stage = context(tmp_path, from_hub(commit))
        fetch.run(stage)
    source = source_json(stage)
    assert (source["kind"], source["folder"]) == ("hub", "model")
    assert (source["repo"], source["commit"]) == ("acme/tiny", commit)
    wanted = checkpoint_files(folder)
    assert sorted(path.name for path in (stage.files / "model").iterdir()) == wanted
    for entry in source["files"]:
        content = (stage.files / "model" / entry["name"]).read_bytes()
        assert content == (folder / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    # linked, not moved: a kill before the commit must not cost the download
    assert list((stage.work / "model").glob("*.safetensors"))


def test_pickles_on_the_hub_are_refused_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        commit = seed(server, folder, drop="model.safetensors")
        with pytest.raises(SourceError, match=r"only pickled weights \(pytorch_model.bin"):
            fetch.run(context(tmp_path, from_hub(commit)))
        assert server.count("/resolve/") == 0


def test_a_snapshot_that_lacks_a_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        commit = seed(server, folder, drop="model-00003-of-00003.safetensors")
        stage = context(tmp_path, from_hub(commit))
        with pytest.raises(SourceError, match=r"model-00003-of-00003.safetensors is missing"):
            fetch.run(stage)
        assert list(stage.files.iterdir()) == []


def test_an_adapter_is_part_of_the_key_with_its_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    given = recipe(model={"source": "checkpoint", "adapter": "adapter"})

    def key() -> dict[str, Any]:
        resolved = local(folder, given, adapter=adapter)
        digests = {**resolved.digests, "adapter": "d"}
        return fetch.key_inputs(Resolved(given, folder, "cpu", digests, resolved.paths), "fetch")

    without = key()
    write_json(adapter / "tokenizer.json", {"model": {}})
    assert key() != without
    assert fetch.environments(local(folder, given), "fetch") == ("llmcompressor",)
    assert fetch.environments(local(folder), "fetch") == ()


def merged(tmp_path: Path, base: Path, adapter: Path, tokenizer: Path) -> Path:
    output = tmp_path / "merged"
    output.mkdir()
    write_json(output / "generation_config.json", {"written_by": "the library"})
    fetch.copy_beside_weights(base, adapter, tokenizer, output)
    return output


def test_a_merge_takes_what_the_adapter_brings(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    (base / "README.md").write_text(CARD)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "tokenizer.json", {"model": {"vocab": {"b": 0}}})
    write_json(adapter / "tokenizer_config.json", {"eos_token": "<eot>"})
    write_json(adapter / "generation_config.json", {"temperature": 0.1})
    (adapter / "README.md").write_text("# An adapter")
    output = merged(tmp_path, base, adapter, tokenizer=adapter)
    assert json.loads((output / "tokenizer.json").read_text())["model"] == {"vocab": {"b": 0}}
    assert not (output / "tokenizer.model").exists()  # the base's would contradict it
    assert json.loads((output / "generation_config.json").read_text()) == {"temperature": 0.1}
    assert (output / "README.md").read_text() == CARD
    assert chat_template(output) == TEMPLATE  # the base's, as the adapter has none


def test_a_merge_takes_the_rest_from_the_base(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("what it was trained with")
    output = merged(tmp_path, base, adapter, tokenizer=base)
    assert chat_template(output) == "what it was trained with"
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    (base / "generation_config.json").unlink()
    again = tmp_path / "again"
    again.mkdir()
    assert not (merged(again, base, adapter, base) / "generation_config.json").exists()
    assert read_checkpoint(base).has_chat_template
