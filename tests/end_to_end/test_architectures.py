"""The table of tensors against transformers itself, and checkpoints that only look wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.architectures import FAMILIES
from quantize.checkpoint import examine, read_checkpoint
from quantize.findings import Told
from quantize.header_checks import check_headers, notes_on_dtypes, promises_of
from quantize.template_checks import check_chat_template
from quantize.tensors import load_tensor
from quantize.tokenizer_checks import check_tokenizer
from tests.end_to_end.conftest import ROOT, environment
from tests.unit.checkpoints import edit_json, write_weights

pytestmark = pytest.mark.end_to_end

HERE = Path(__file__).parent
TOKENIZER = ROOT / "examples" / "tiny_llama" / "instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARY = 2048
NOT_IN_THE_TABLE = "not-in-the-table"


@pytest.fixture(scope="module")
def families(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of checkpoints, one for each family and option, with a tokenizer in each."""
    folder = tmp_path_factory.mktemp("families")
    made = subprocess.run(
        [environment_python("llmcompressor"), HERE / "make_families.py", folder, str(VOCABULARY)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    for checkpoint in folder.iterdir():
        for name in TOKENIZER_FILES:
            shutil.copyfile(TOKENIZER / name, checkpoint / name)
    return folder


def told(folder: Path) -> Told:
    """Everything that the checks of a checkpoint say."""
    checkpoint, findings = examine(folder)
    if checkpoint is None:
        return Told(findings)
    promises = promises_of(checkpoint)
    assert promises is not None
    tokenizer = check_tokenizer(checkpoint)
    findings = [*check_headers(checkpoint, promises), *tokenizer.findings]
    findings += check_chat_template(checkpoint)
    return Told(findings, [*tokenizer.notes, *notes_on_dtypes(checkpoint)])


def test_every_family_is_what_transformers_saves(families: Path) -> None:
    found = set()
    for folder in sorted(families.iterdir()):
        checkpoint = read_checkpoint(folder)
        promises = promises_of(checkpoint)
        if folder.name == NOT_IN_THE_TABLE:
            assert promises is None
            continue
        assert promises is not None, folder.name
        shapes = {name: promise.shape for name, promise in promises.items()}
        if checkpoint.tied_embeddings:
            assert not promises["lm_head.weight"].required
            del shapes["lm_head.weight"]
        assert {n: i.shape for n, i in checkpoint.tensors.items()} == shapes, folder.name
        assert check_headers(checkpoint, promises) == []
        found.add(checkpoint.architecture)
    assert found == set(FAMILIES)


def tensors_of(folder: Path) -> dict[str, Any]:
    infos = read_checkpoint(folder).tensors
    return {name: (info.dtype, load_tensor(info)) for name, info in infos.items()}


Change = Callable[[Path], None]


def rewrite(change: Callable[[dict[str, Any]], dict[str, Any]], shards: int = 1) -> Change:
    """A change of the weights' file."""

    def write(folder: Path) -> None:
        tensors = change(tensors_of(folder))
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        write_weights(folder, {n: (d, v.copy()) for n, (d, v) in tensors.items()}, shards)

    return write


def config(**keys: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", keys)


def tokenizer(**keys: Any) -> Change:
    return lambda folder: edit_json(folder / "tokenizer_config.json", keys)


def with_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def with_buffers(tensors: dict[str, Any]) -> dict[str, Any]:
    norm = tensors["model.norm.weight"]
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return tensors | {name.format(layer): (norm[0], norm[1][:4]) for layer in range(2)}


def norms_in_fp32(tensors: dict[str, Any]) -> dict[str, Any]:
    from quantize.tensors import to_float32

    return {
        n: ("F32", to_float32(v, d)) if n.endswith("norm.weight") else (d, v)
        for n, (d, v) in tensors.items()
    }


def one_named_shard(folder: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(tensors_of(folder), name)}  # without metadata
    (folder / "model.safetensors").rename(folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def wrong_total_size(folder: Path) -> None:
    rewrite(dict, shards=3)(folder)
    edit_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}})


def named_templates(folder: Path) -> None:
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    entries = [{"name": "tool_use", "template": "{{ tools }}"}]
    tokenizer(chat_template=[*entries, {"name": "default", "template": template}])(folder)


def sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    shutil.copyfile(TOKENIZER / "tokenizer.model", folder / "tokenizer.model")


def no_template(folder: Path) -> None:
    tokenizer(chat_template=None)(folder)


def insisting_template(folder: Path) -> None:
    """Some refuse a conversation without a system message, some one with it."""
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    text += "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer(chat_template=text)(folder)


def older_dtype_key(folder: Path) -> None:
    config(dtype=None, torch_dtype="bfloat16")(folder)


def added_token(folder: Path) -> None:
    """A token behind the embedding that nothing uses, as Gemma 3 of 1B has one for images."""
    path = folder / "tokenizer.json"
    stated = json.loads(path.read_text())
    stated["added_tokens"].append({"id": VOCABULARY, "content": "<image>", "special": True})
    path.write_text(json.dumps(stated))


def read_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)


UNUSUAL: dict[str, tuple[str, Change]] = {
    "tied, and the head stored as well": ("llama-tied", rewrite(with_head)),
    "tied by the default of the family": ("gemma2", config(tie_word_embeddings=None)),
    "rotary buffers of an old checkpoint": ("llama", rewrite(with_buffers)),
    "norms in FP32": ("llama", rewrite(norms_in_fp32)),
    "FP32": ("llama-fp32", config()),
    "FP16 in three shards": ("llama-fp16-sharded", config()),
    "one shard with a number, index without metadata": ("llama", one_named_shard),
    "wrong total_size in the index": ("llama", wrong_total_size),
    "torch_dtype instead of dtype": ("llama", older_dtype_key),
    "no dtype at all": ("llama", config(dtype=None, torch_dtype=None)),
    "head_dim that is not hidden / heads": ("llama-wide-heads", config()),
    "one key-value head": ("llama-one-kv-head", config()),
    "one layer": ("llama-one-layer", config()),
    "key-value heads left to the default": ("smollm3", config(pad_token_id=-1)),
    "biases": ("llama-biases", config()),
    "experts, some layers dense": ("qwen3_moe-some-dense", config()),
    "experts of Mixtral": ("mixtral", config()),
    "sliding windows in some layers": ("qwen2-sliding", config()),
    "no generation_config": ("llama", lambda f: (f / "generation_config.json").unlink()),
    "several eos ids, one of them unused": ("llama", config(eos_token_id=[2, 6, 2047])),
    "pad id -1": ("llama", config(pad_token_id=-1)),
    "no chat template": ("llama", no_template),
    "several chat templates": ("llama", named_templates),
    "a template that refuses system messages": ("llama", insisting_template),
    "tokenizer.model alone": ("llama", sentencepiece_alone),
    "an added token without a row": ("llama", added_token),
    "a pad token that is nowhere": ("llama", tokenizer(pad_token="<pad>")),
    "a README beside it": ("llama", lambda f: (f / "README.md").write_text("# no front matter")),
    "read-only": ("llama", read_only),
}


@pytest.fixture
def unusual(families: Path, tmp_path: Path) -> Iterator[Callable[[str, Change], Path]]:
    """A changed copy of a family, in a folder with a space and a letter beyond ASCII."""
    folder = tmp_path / "Modèle à moi (1)"

    def copy(family: str, change: Change) -> Path:
        shutil.copytree(families / family, folder)
        change(folder)
        return folder

    yield copy
    folder.chmod(0o755)


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_checkpoint_is_no_fault(unusual: Any, name: str) -> None:
    assert told(unusual(*UNUSUAL[name])).findings == []


def test_a_padded_vocabulary_is_usual(families: Path) -> None:
    folder = families / "llama"
    assert read_checkpoint(folder).tensors["lm_head.weight"].shape[0] == VOCABULARY
    assert told(folder) == Told()


FAULTY: dict[str, tuple[str, Change, str]] = {
    "a missing norm": (
        "llama",
        rewrite(lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}),
        "lacks model.norm.weight",
    ),
    "a missing bias": (
        "qwen2",
        rewrite(lambda t: {n: v for n, v in t.items() if "1.self_attn.q_proj.bias" not in n}),
        "lacks model.layers.1.self_attn.q_proj.bias",
    ),
    "biases that config.json does not turn on": (
        "llama-biases",
        config(mlp_bias=False),
        "has no place for",
    ),
    "a missing head": (
        "llama",
        rewrite(lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}),
        "lacks lm_head.weight",
    ),
    "one layer too few": ("llama", config(num_hidden_layers=3), "lacks model.layers.2"),
    "one layer too many": ("llama", config(num_hidden_layers=1), "has no place for model.layers.1"),
    "another width": ("llama", config(intermediate_size=64), "other shapes"),
    "other heads": ("llama", config(num_key_value_heads=4), "other shapes"),
}


def test_what_the_checks_refuse_the_strict_loader_refuses(
    families: Path, environment_python: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = []
    for number, (family, change, _) in enumerate(FAULTY.values()):
        folder = tmp_path / str(number)
        shutil.copytree(families / family, folder)
        change(folder)
        assert told(folder).findings, folder
        folders.append(folder)
    folders += [families / "llama", families / "mixtral", families / NOT_IN_THE_TABLE]
    done = subprocess.run(
        [environment_python("llmcompressor"), HERE / "strict_loading.py", *folders],
        env=environment({"PYTHONPATH": os.fspath(ROOT)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[len(FAULTY) :] == ["loaded"] * 3
    for line, (name, (_, _, expected)) in zip(said, FAULTY.items(), strict=False):
        assert expected in line, (name, line)
