import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from quantize.errors import RecipeError, SourceError
from quantize.hash_cache import HashCache, stamp_of
from quantize.keys import digest, file_sha256
from quantize.recipe_file import load_recipe
from quantize.resolve import resolve, task_files
from quantize.stages.base import Resolved
from tests.hub_server import Account, Hub, HubServer
from tests.unit.checkpoints import safetensors_bytes, write_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"

RECIPE = """\
version: 1
name: example
model:
  source: model
calibration:
  source: data/rows.jsonl
quantize:
  method: awq
evaluate:
  suite: suites/mine.yaml
"""
SUITE = """\
version: 1
name: mine
description: Mine.
smoke: prompts.yaml
perplexity:
  text: ../data/text.txt
tasks_folder: ../tasks
tasks:
  - {name: own, metric: acc}
  - {name: gsm8k, metric: exact_match}
"""
PROMPTS = "version: 1\nname: p\nprompts:\n- {name: a, kind: completion, prompt: x}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with every kind of local input beside it."""
    files = {
        "recipe.yaml": RECIPE,
        "model/config.json": "{}",
        "model/notes.log": "not part of the checkpoint",
        "data/rows.jsonl": '{"text": "a"}\n',
        "data/text.txt": "held out",
        "suites/mine.yaml": SUITE,
        "suites/prompts.yaml": PROMPTS,
        "tasks/_common.yaml": "num_fewshot: 0\n",
        "tasks/first/own.yaml": "include: ../_common.yaml\ntask: own\n",
        "tasks/first/data/own.jsonl": "{}\n",
        "tasks/second/other.yaml": "task: other\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    write_weights(tmp_path / "model", {"w": ("F32", np.zeros(2, "<f4"))})
    return tmp_path


def resolved(
    folder: Path, *overrides: str, online: bool = False, limit: int | None = None
) -> Resolved:
    path = folder / "recipe.yaml"
    recipe = load_recipe(path, overrides)
    return resolve(
        recipe,
        path,
        "cpu",
        online=online,
        cache_path=folder / "cache/hashes.json",
        hash_limit_bytes=limit,
    )


def changed(before: Resolved, after: Resolved) -> set[str]:
    names = before.digests.keys() | after.digests.keys()
    return {n for n in names if before.digests.get(n) != after.digests.get(n)}


def test_local_inputs(folder: Path) -> None:
    got = resolved(folder)
    assert set(got.digests) == {"model", "calibration", "suite", "text", "prompts", "tasks"}
    assert got.digests["calibration"] == file_sha256(folder / "data/rows.jsonl")
    assert got.digests["model"] == digest(
        {
            name: file_sha256(folder / "model" / name)
            for name in ("config.json", "model.safetensors")
        }
    )
    assert got.paths["text"].resolve() == folder / "data/text.txt"
    assert got.paths["tasks"].resolve() == folder / "tasks"
    assert got.suite is not None and got.suite.name == "mine"
    assert got.folder == folder


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("model/model.safetensors", {"model"}),
        ("model/tokenizer.json", {"model"}),
        ("model/notes.log", set()),
        ("data/rows.jsonl", {"calibration"}),
        ("data/text.txt", {"text"}),
        ("tasks/_common.yaml", {"tasks"}),
        ("tasks/first/own.yaml", {"tasks"}),
        ("tasks/first/data/own.jsonl", {"tasks"}),
        ("tasks/first/utils.py", {"tasks"}),
        ("tasks/first/__pycache__/utils.pyc", set()),
        ("tasks/second/other.yaml", set()),
    ],
)
def test_which_digest_a_file_changes(folder: Path, file: str, names: set[str]) -> None:
    before = resolved(folder)
    (folder / file).parent.mkdir(exist_ok=True)
    with open(folder / file, "a") as handle:
        handle.write("# more\n")
    assert changed(before, resolved(folder)) == names


def test_suite_and_prompts_count_by_what_they_say(folder: Path) -> None:
    before = resolved(folder)
    suite = folder / "suites/mine.yaml"
    suite.write_text("# a comment\n" + SUITE.replace("Mine.", "Something else."))
    (folder / "suites/prompts.yaml").write_text(PROMPTS + "# a comment\n")
    assert changed(before, resolved(folder)) == set()
    suite.write_text(SUITE.replace("metric: acc}", "metric: acc, limit: 5}"))
    (folder / "suites/prompts.yaml").write_text(PROMPTS.replace("prompt: x", "prompt: z"))
    assert changed(before, resolved(folder)) == {"suite", "prompts"}


def test_only_what_the_recipe_needs(folder: Path) -> None:
    (folder / "data/rows.jsonl").unlink()
    got = resolved(folder, "quantize.method=fp8", "evaluate=null")
    assert set(got.digests) == {"model"}
    assert got.suite is None


def test_adapter(folder: Path) -> None:
    (folder / "lora").mkdir()
    with pytest.raises(SourceError, match="holds no adapter files"):
        resolved(folder, "model.adapter=lora")
    (folder / "lora/adapter_config.json").write_text("{}")
    weights = safetensors_bytes({"w": ("F32", np.full(2, 0, "<f4"))})
    (folder / "lora/adapter_model.safetensors").write_bytes(weights)
    before = resolved(folder, "model.adapter=lora")
    weights = safetensors_bytes({"w": ("F32", np.full(2, 1, "<f4"))})
    (folder / "lora/adapter_model.safetensors").write_bytes(weights)
    assert changed(before, resolved(folder, "model.adapter=lora")) == {"adapter"}


def test_pinned_repositories_need_no_network(folder: Path) -> None:
    got = resolved(folder, "model.source=a/b", f"model.revision={COMMIT}")
    assert got.digests["model"] == f"a/b@{COMMIT}"
    assert "model" not in got.paths


@pytest.mark.parametrize("revision", ["main", "null", COMMIT[:12]])
def test_a_branch_stays_open_offline(folder: Path, revision: str) -> None:
    got = resolved(folder, "model.source=a/b", f"model.revision='{revision}'".replace("'null'", ""))
    assert "model" not in got.digests


def test_a_branch_is_looked_up_online(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"hf_test": Account("ann")})
    model = hub.create("model", "a/b", private=False)
    data = hub.create("dataset", "a/rows", private=False)
    with HubServer(hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        got = resolved(folder, "model.source=a/b", "calibration.source=a/rows", online=True)
    assert got.digests["model"] == f"a/b@{model.resolve('main')}"
    assert got.digests["calibration"] == f"a/rows@{data.resolve('main')}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.source=./absent", "model.source: there is no folder './absent'"),
        ("model.source=data", "holds no checkpoint files"),
        ("calibration.source=absent.jsonl", "calibration.source: there is no file"),
        ("model.adapter=./absent", "model.adapter: there is no folder"),
    ],
)
def test_missing_inputs(folder: Path, override: str, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolved(folder, override)
    assert words in caught.value.message
    assert caught.value.hint


def test_missing_inputs_of_a_suite(folder: Path) -> None:
    suite = folder / "suites/mine.yaml"
    suite.write_text(SUITE.replace("text.txt", "absent.txt"))
    with pytest.raises(SourceError, match=r"perplexity\.text of suite mine"):
        resolved(folder)
    suite.write_text(SUITE.replace("../tasks", "../absent"))
    with pytest.raises(SourceError, match=r"no tasks folder '\.\./absent'"):
        resolved(folder)
    suite.write_text("version: 3\n")
    with pytest.raises(RecipeError) as caught:
        resolved(folder)
    assert caught.value.file == str(suite)


def test_own_tasks_may_be_groups(folder: Path) -> None:
    (folder / "tasks/second/group.yaml").write_text('group: "pair"\ntask: [own, other]\n')
    names = task_files(folder / "tasks", ["pair"])
    assert names == ["_common.yaml", "second/group.yaml", "second/other.yaml"]


def test_a_large_checkpoint_waits_until_it_may_be_hashed(folder: Path) -> None:
    size = sum((folder / "model" / n).stat().st_size for n in ("config.json", "model.safetensors"))
    assert "model" not in resolved(folder, limit=size - 1).digests
    assert "model" in resolved(folder, limit=size).digests


def old(path: Path, text: str) -> Path:
    path.write_text(text)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def test_cache_answers_without_reading(tmp_path: Path) -> None:
    file, saved = old(tmp_path / "a", "one"), tmp_path / "deep/cache.json"
    cache = HashCache(saved, settle_seconds=-1)
    true = cache.sha256(file)
    assert true == file_sha256(file)
    cache.save()
    entries = json.loads(saved.read_text())
    entries[str(file)][-1] = "from the cache"
    saved.write_text(json.dumps(entries))
    again = HashCache(saved)
    assert again.unknown_bytes([file]) == 0
    assert again.sha256(file) == "from the cache"
    # same size and mtime, other content: ctime or inode gives it away
    old(file, "two")
    assert HashCache(saved).sha256(file) == file_sha256(file) != true


@pytest.mark.parametrize("part", ["size", "mtime", "ctime", "inode"])
def test_each_part_of_the_stamp_counts(part: str, tmp_path: Path) -> None:
    file, saved = old(tmp_path / "a", "one"), tmp_path / "cache.json"
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    entry = [*stamp, "from the cache"]
    saved.write_text(json.dumps({str(file): entry}))
    assert HashCache(saved).sha256(file) == "from the cache"
    entry[["size", "mtime", "ctime", "inode"].index(part)] += 1
    saved.write_text(json.dumps({str(file): entry}))
    assert HashCache(saved).sha256(file) == file_sha256(file)


def test_cache_does_not_remember_a_file_that_changed_meanwhile(tmp_path: Path) -> None:
    file = old(tmp_path / "a", "one")
    cache = HashCache(tmp_path / "cache.json", settle_seconds=-1)
    cache.remember(file, [3, 0, 0, 0], "of what it was")
    assert cache.entries == {}
    cache.remember(file, stamp_of(file), "of what it is")
    assert str(file) in cache.entries


def test_cache_does_not_remember_files_just_written(tmp_path: Path) -> None:
    file = old(tmp_path / "a", "one")  # its ctime is now
    cache = HashCache(tmp_path / "cache.json", settle_seconds=3600)
    cache.sha256(file)
    cache.save()
    assert not (tmp_path / "cache.json").exists()


def test_cache_forgets_files_that_are_gone(tmp_path: Path) -> None:
    saved = tmp_path / "cache.json"
    first, second = old(tmp_path / "a", "one"), old(tmp_path / "b", "two")
    cache = HashCache(saved, settle_seconds=-1)
    cache.tree(tmp_path, ["a", "b"])
    first.unlink()
    cache.save()
    assert list(json.loads(saved.read_text())) == [str(second)]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 3}', "\udcff"])
def test_damaged_cache_is_no_cache(tmp_path: Path, text: str) -> None:
    saved = tmp_path / "cache.json"
    saved.write_bytes(text.encode("utf-8", "surrogateescape"))
    file = old(tmp_path / "a", "one")
    assert HashCache(saved).sha256(file) == file_sha256(file)


def test_hashing_reports_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cache = HashCache(tmp_path / "c.json", on_hashed=lambda done, total: seen.append((done, total)))
    old(tmp_path / "a", "one")
    old(tmp_path / "b", "three")
    cache.tree(tmp_path, ["a", "b"])
    assert seen[-1] == (8, 8) and len(seen) == 2


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        HashCache(tmp_path / "c.json").sha256(tmp_path / "absent")


def test_what_waits_is_not_hashed_when_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a signal comes: a checkpoint may be a hundred files of 5 GB."""
    files = [tmp_path / str(number) for number in range(40)]
    for file in files:
        file.write_text("")
    read: list[Path] = []

    def slowly(file: Path) -> str:
        read.append(file)
        time.sleep(0.02)
        raise SourceError(f"cannot read {file}")

    monkeypatch.setattr("quantize.hash_cache._read_sha256", slowly)
    with pytest.raises(SourceError):
        HashCache(tmp_path / "cache.json").sha256_all(files)
    assert len(read) < len(files)
