"""Checkpoint folders: what is read, and everything that is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    TEMPLATE,
    edit_json,
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_checkpoint,
    write_json,
    write_weights,
)

from quantize.checkpoint import (
    PACKED,
    QUANTIZATION_KEYS,
    card_metadata,
    chat_template,
    checkpoint_files,
    examine,
    read_checkpoint,
)
from quantize.errors import CredentialsError, ResourceError, SourceError
from quantize.findings import Finding, raise_findings
from quantize.untrusted import FRONT_MATTER_LIMIT_BYTES

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def refused(folder: Path) -> str:
    checkpoint, findings = examine(folder)
    assert checkpoint is None
    assert all(finding.hint for finding in findings)
    return " | ".join(finding.message for finding in findings)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_checkpoint(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors()
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, tensors, shards=shards))
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.parameters == sum(values.size for _, values in tensors.values())
    assert checkpoint.weight_bytes == 2 * checkpoint.parameters
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.hidden_size == 128
    assert not checkpoint.tied_embeddings
    assert checkpoint.has_chat_template
    assert len(checkpoint.layer_linears()) == 14
    assert {info.name for info in checkpoint.linears()} == {
        *(info.name for info in checkpoint.layer_linears()),
        "lm_head.weight",
    }
    assert len(checkpoint.index) == (0 if shards == 1 else len(tensors))


def test_tied_embeddings_as_stated_or_as_the_tensors_say(tmp_path: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied", llama_tensors(tied=True), llama_config(tied=True))
    assert read_checkpoint(tied).tied_embeddings
    edit_json(tied / "config.json", {"tie_word_embeddings": None})
    assert read_checkpoint(tied).tied_embeddings
    untied = write_checkpoint(tmp_path / "untied")
    edit_json(untied / "config.json", {"tie_word_embeddings": None})
    assert not read_checkpoint(untied).tied_embeddings


def test_files_that_do_not_belong_are_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "train.py").write_text("print()")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "LICENSE.txt").write_text("Apache")
    (folder / "original").mkdir()
    names = checkpoint_files(folder)
    assert "LICENSE.txt" in names
    assert not {"optimizer.pt", "train.py", "consolidated.safetensors", "original"} & set(names)
    assert read_checkpoint(folder).files == tuple(names)


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02pickle")
    message = refused(folder)
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "save_pretrained" in examine(folder)[1][0].hint


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    (folder / SECOND).unlink()
    assert f"{SECOND} is missing" in refused(folder)


def test_the_index_and_the_shards_must_agree_both_ways(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    del index["model.norm.weight"]
    index["model.invented.weight"] = SECOND
    write_json(folder / INDEX, {"weight_map": index})
    message = refused(folder)
    assert "has tensor model.norm.weight, which" in message
    assert f"{SECOND} lacks tensor model.invented.weight" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    tensors = llama_tensors()
    names = [*list(tensors)[1::3], next(iter(tensors))]
    (folder / SECOND).write_bytes(safetensors_bytes({name: tensors[name] for name in names}))
    assert "model.embed_tokens.weight, which an earlier shard has" in refused(folder)


def test_a_shard_that_no_index_names_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    write_weights(folder, llama_tensors())  # a model.safetensors beside the shards
    assert "model.safetensors belongs to no part" in refused(folder)
    single = write_checkpoint(tmp_path / "single")
    (single / "adapter_model.safetensors").write_bytes(safetensors_bytes({}))
    assert "adapter_model.safetensors belongs to no part" in refused(single)


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        (None, "has no weight_map"),
        ({"a": "../model.safetensors"}, "not in a file beside it"),
        ({"a": "pytorch_model.bin"}, "not a safetensors file"),
    ],
)
def test_an_index_that_cannot_be_one(tmp_path: Path, weight_map: object, fault: str) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    write_json(folder / INDEX, {"weight_map": weight_map})
    assert fault in " | ".join(finding.message for finding in examine(folder)[1])


def test_a_truncated_shard_is_named_with_its_sizes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    size = (folder / SECOND).stat().st_size
    with (folder / SECOND).open("r+b") as file:
        file.truncate(size - 10)
    assert f"{SECOND} is truncated: its header promises {size} bytes" in refused(folder)


def test_lfs_pointers_are_named_whatever_they_stand_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes(POINTER)
    message = refused(folder)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert f"{name} is a git-lfs pointer" in message
    assert "JSON" not in message


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("config.json", {"architectures": None}, "names no architecture"),
        ("config.json", {"architectures": []}, "names no architecture"),
        (
            "config.json",
            {"auto_map": {"AutoModel": "x.Y"}},
            "Python code (auto_map in config.json)",
        ),
        ("tokenizer_config.json", {"auto_map": {}}, "auto_map in tokenizer_config.json"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "awq"}},
            "already quantized (quantization_config in config.json: awq)",
        ),
    ],
)
def test_a_config_that_is_refused(tmp_path: Path, name: str, change: dict, fault: str) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / name, change)
    assert fault in refused(folder)


def test_other_signs_of_code_and_of_quantization(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "modeling_tiny.py").write_text("import os")
    assert "modeling_tiny.py" in refused(folder)
    (folder / "modeling_tiny.py").unlink()
    write_json(folder / "preprocessor_config.json", {"auto_map": {"AutoProcessor": "x.Y"}})
    assert "auto_map in preprocessor_config.json" in refused(folder)
    tensors = llama_tensors()
    tensors["lm_head.weight"] = ("I8", np.zeros((96, 128), "i1"))
    other = write_checkpoint(tmp_path / "int8", tensors)
    assert "lm_head.weight is I8" in refused(other)
    assert examine(other, allow_quantized=True)[0] is not None


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
def test_each_key_of_a_config_that_says_quantized(tmp_path: Path, key: str) -> None:
    assert key in QUANTIZATION_KEYS
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", {key: {}})
    assert f"already quantized ({key} in config.json)" in refused(folder)


SIGNS = (
    *(".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB"),
    *(".quant_state.bitsandbytes__nf4", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".weight_zero_point", "_proj_blocks", "_proj_scales"),
)


@pytest.mark.parametrize("end", SIGNS)
def test_each_name_of_a_tensor_that_says_quantized(tmp_path: Path, end: str) -> None:
    """By the name alone: its dtype is one that weights have, or it has one dimension."""
    name = f"model.layers.0.mlp.up{end}"
    tensors = llama_tensors(layers=1) | {name: ("F32", np.zeros(4, "<f4"))}
    assert f"already quantized ({name})" in refused(write_checkpoint(tmp_path, tensors))


def test_every_such_name_is_tried() -> None:
    assert set(SIGNS) == set(PACKED)


def test_files_that_are_not_there_or_not_json(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path / "file")
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text('{"a": 1,\n "b": }')
    assert "not valid JSON" in refused(folder)
    assert "line 2" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "holds a list, not a JSON object" in refused(folder)
    (folder / "config.json").unlink()
    write_json(folder / "adapter_config.json", {})
    assert "no config.json" in refused(folder)
    assert "model.adapter" in examine(folder)[1][0].hint


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)
    (folder / SECOND).unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    edit_json(folder / "config.json", {"architectures": None})
    with pytest.raises(SourceError) as error:
        read_checkpoint(folder)
    assert error.value.message.startswith("3 things")
    for part in ("no tokenizer", "no architecture", f"{SECOND} is missing", "→"):
        assert part in error.value.message


def test_findings_take_the_lowest_exit_code() -> None:
    source = Finding("a", "b")
    disk = Finding("c", "d", ResourceError)
    token = Finding("e", "f", CredentialsError)
    with pytest.raises(SourceError):
        raise_findings([token, disk, source])
    with pytest.raises(ResourceError, match="2 things"):
        raise_findings([token, disk])
    with pytest.raises(CredentialsError) as error:
        raise_findings([token])
    assert (error.value.message, error.value.hint) == ("e", "f")
    raise_findings([])


def test_the_chat_template_that_transformers_would_use(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert chat_template(folder) == TEMPLATE
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert chat_template(folder) == "d"
    (folder / "chat_template.jinja").write_text("from a file")
    assert chat_template(folder) == "from a file"
    assert chat_template(write_checkpoint(tmp_path / "without", template=None)) is None


def test_card_metadata_keeps_yaml_traps_as_text(tmp_path: Path) -> None:
    assert card_metadata(tmp_path) == {}
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: apache-2.0\nlanguage:\n- no\n- en\n---\n# Title\n")
    assert card_metadata(tmp_path) == {"license": "apache-2.0", "language": ["no", "en"]}
    readme.write_text("---\n" + "".join(f"k{n}: [a]\n" for n in range(100)) + "---\n")
    assert len(card_metadata(tmp_path)) == 100  # side by side, not inside each other
    readme.write_text("# No front matter\n---\n")
    assert card_metadata(tmp_path) == {}
    readme.write_text("---\n" + "k: " + "x" * FRONT_MATTER_LIMIT_BYTES + "\n---\n")
    with pytest.raises(SourceError, match="longer than"):
        card_metadata(tmp_path)
    readme.write_text("---\nlicense: [\n---\n")
    with pytest.raises(SourceError, match="front matter"):
        card_metadata(tmp_path)
