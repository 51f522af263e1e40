"""Everything that can be known before weights load, reported together."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import (
    HIDDEN,
    INTERMEDIATE,
    edit_json,
    llama_config,
    llama_tensors,
    recipe,
    write_checkpoint,
)
from hub_fixture import READ_TOKEN, TOKEN, hub_server, online

from quantize import calibration_checks, resource_checks
from quantize import preflight as parts
from quantize.calibration_checks import check_calibration
from quantize.checklist import preflight
from quantize.checkpoint import read_checkpoint
from quantize.errors import (
    ConflictError,
    CredentialsError,
    ResourceError,
    SourceError,
    UsageError,
)
from quantize.recipe import Recipe
from quantize.source_checks import (
    check_checkpoint,
    check_schemes,
    check_source,
    promised_bytes,
)
from quantize.stages.base import Resolved
from quantize.suite import Load, PerplexityText, Suite
from quantize.workers import rows
from tests.unit.adapters import write_adapter

ROWS = [{"messages": [{"role": "user", "content": "Hello"}]}, {"text": "Some text."}]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def resolved(tmp_path: Path, given: Recipe, **paths: Path) -> Resolved:
    if "calibration" not in paths:
        paths["calibration"] = lines(tmp_path / "calibration.jsonl", *ROWS)
    return Resolved(given, tmp_path, "cpu", {}, paths)


def messages(folder: Path, **blocks: Any) -> str:
    """All findings on a checkpoint for a recipe."""
    found = check_source(read_checkpoint(folder), recipe(**blocks))
    assert all(finding.hint for finding in found)
    return " | ".join(f"{finding.message} → {finding.hint}" for finding in found)


def awq(**keys: Any) -> dict[str, Any]:
    return {"quantize": {"method": "awq", "group_size": 32} | keys}


def test_a_sound_run_passes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    preflight(resolved(tmp_path, recipe(), model=folder), tmp_path / "not" / "yet")


def test_findings_of_all_kinds_come_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # where a login would have left a token
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    folder = write_checkpoint(tmp_path / "checkpoint")
    empty = lines(tmp_path / "empty.jsonl")
    given = recipe(**awq(group_size=48), publish={"hub": {"repo": "ann/tiny"}})
    with pytest.raises(SourceError) as error:
        preflight(resolved(tmp_path, given, model=folder, calibration=empty), tmp_path)
    for part in ("3 things", "group size 48", "empty.jsonl is empty", "there is no token"):
        assert part in error.value.message
    preflight(
        resolved(tmp_path, recipe(publish={"hub": {"repo": "ann/tiny"}}), model=folder),
        tmp_path,
        {"compress"},  # what is done already needs no token
    )
    with pytest.raises(CredentialsError, match="no token"):
        preflight(
            resolved(tmp_path, recipe(publish={"hub": {"repo": "ann/tiny"}}), model=folder),
            tmp_path,
        )


def test_a_broken_checkpoint_is_reported_with_the_rest(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(SourceError) as error:
        preflight(resolved(tmp_path, recipe(), model=folder, calibration=bad), tmp_path)
    assert "model-00002-of-00003.safetensors is missing" in error.value.message
    assert "bad.jsonl:2: not JSON" in error.value.message


def test_a_group_size_that_does_not_divide(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, llama_tensors(hidden=96), llama_config(hidden=96))
    found = messages(folder, **awq(group_size=64))
    assert "group size 64 does not divide the input dimension of" in found
    assert "model.layers.0.self_attn.q_proj.weight [96, 96] and 11 more" in found
    assert "→ set quantize.group_size to 32" in found
    assert "64 or" not in found
    everything_odd = ["lm_head", "re:.*self_attn.*", "re:.*(gate|up)_proj"]
    assert messages(folder, **awq(group_size=64, ignore=everything_odd)) == ""
    assert messages(folder, quantize={"method": "fp8"}) == ""


def test_fp8_blocks_need_multiples_of_128(tmp_path: Path) -> None:
    sound = write_checkpoint(tmp_path / "sound")
    found = messages(sound, quantize={"method": "fp8", "scheme": "FP8_BLOCK"})
    assert "k_proj.weight [64, 128]" in found  # joined with v_proj by the server
    assert "v_proj" not in found  # the last of those joined is padded
    assert "FP8_DYNAMIC" in found
    ignore = ["lm_head", "re:.*[qkv]_proj"]
    block = {"method": "fp8", "scheme": "FP8_BLOCK", "ignore": ignore}
    assert messages(sound, quantize=block) == ""


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        (2, ""),
        (3, "4 attention heads"),
        (8, "4 attention heads"),
        (4, ""),  # two key-value heads are replicated
    ],
)
def test_tensor_parallel_sizes(tmp_path: Path, size: int, fault: str) -> None:
    folder = write_checkpoint(tmp_path)
    found = messages(folder, serve={"tensor_parallel_sizes": [1, size]})
    assert (fault in found) if fault else (found == "")


def test_groups_must_not_straddle_two_gpus(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    found = messages(folder, **awq(group_size=128), serve={"tensor_parallel_sizes": [2]})
    assert "tensor parallel size 2 does not split model.layers.0.self_attn.o_proj with 128" in found
    assert f"down_proj with {INTERMEDIATE}" not in found  # 256 = 2 shares of 128


def test_ignore_entries_that_match_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert "'lm_haed' matches none" in messages(folder, **awq(ignore=["lm_haed"]))
    assert "nothing to quantize" in messages(folder, **awq(ignore=["re:.*"]))


def overridden(*overrides: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return awq(overrides=list(overrides), **keys)


def test_override_patterns_that_match_nothing_or_too_late(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    down = {"modules": ["re:.*down_proj$"], "scheme": "W8A16"}
    assert messages(folder, **overridden(down)) == ""
    found = messages(folder, **overridden({"modules": ["re:.*dwn_proj$"], "scheme": "W8A16"}))
    assert "quantize.overrides[0].modules: 're:.*dwn_proj$' matches none of the 15 linears" in found
    assert "names look like model.layers.0.mlp.down_proj," in found
    found = messages(folder, **overridden(down, down))
    assert "quantize.overrides[1] changes nothing" in found
    found = messages(folder, **overridden(down, ignore=["lm_head", "re:.*mlp.*"]))
    assert "quantize.overrides[0] changes nothing" in found


def test_groups_of_an_override(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, llama_tensors(hidden=96), llama_config(hidden=96))
    qkv = {"modules": ["re:.*[qkv]_proj$"], "scheme": "W4A16", "group_size": 64}
    found = messages(folder, **overridden(qkv))
    assert found.count("group size") == 1
    assert "set quantize.overrides[0].group_size to 32 or channel" in found
    assert messages(folder, **overridden(qkv | {"group_size": "channel"})) == ""
    fixed = {"method": "rtn", "scheme": "NVFP4A16"}
    assert messages(folder, quantize=fixed) == ""
    folder = write_checkpoint(tmp_path, llama_tensors(hidden=72), llama_config(hidden=72))
    found = messages(folder, quantize=fixed)
    assert "group size 16 does not divide" in found and "take a scheme without groups" in found


def test_tensor_parallel_shares_of_an_override(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    down = {"modules": ["re:.*down_proj$"], "scheme": "W4A16", "group_size": 256}
    serve = {"tensor_parallel_sizes": [2]}
    found = messages(folder, **overridden(down), serve=serve)
    assert "down_proj with 256 inputs (shares of 256 inputs each)" in found
    assert "o_proj" not in found
    assert messages(folder, **overridden(down | {"group_size": "channel"}), serve=serve) == ""


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"overrides": [{"modules": ["re:.*v_proj$"], "scheme": "W8A16"}]},
            "q_proj in W4A16_ASYM with groups of 32, model.layers.0.self_attn.v_proj in W8A16 with",
        ),
        ({"ignore": ["lm_head", "re:.*gate_proj$"]}, "gate_proj in BF16, model.layers.0.mlp.up_"),
        ({"overrides": [{"modules": ["re:.*[qkv]_proj$"], "scheme": "W8A16"}]}, ""),
        ({"overrides": [{"modules": ["re:.*layers.0."], "scheme": "FP8_DYNAMIC"}]}, ""),
    ],
)
def test_what_is_served_as_one_has_one_format(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    found = messages(write_checkpoint(tmp_path), **awq(**keys))
    assert said in found
    assert found.startswith("vLLM serves as one") if said else found == ""
    assert ("and 1 more groups" in found) == bool(said)


def test_a_tied_head_is_not_quantized_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, llama_tensors(tied=True), llama_config(tied=True))
    assert "lm_head shares its weight" in messages(folder, **awq(ignore=[]))
    assert messages(folder) == ""  # the default ignore names lm_head, which is absent


def test_lengths_beyond_the_positions(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    calibration = {"source": "c.jsonl", "sequence_length": 1024}
    found = messages(folder, calibration=calibration, serve={"max_model_len": 513})
    assert "calibration.sequence_length is 1024, the checkpoint has 512 positions" in found
    assert "serve.max_model_len is 513" in found
    assert messages(folder, calibration=calibration, quantize={"method": "fp8"}) == ""  # unread
    edit_json(folder / "config.json", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert messages(folder, calibration=calibration) == ""


def test_a_suite_that_does_not_fit_the_context(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    suite = Suite(
        version=1,
        name="s",
        perplexity=PerplexityText(text="t.jsonl", window=512),
        load=Load(input_tokens=400, output_tokens=200),
    )
    paths = {"model": folder, "calibration": lines(tmp_path / "c.jsonl", *ROWS)}
    given = Resolved(recipe(), tmp_path, "cpu", {}, paths, suite)
    with pytest.raises(SourceError) as error:
        preflight(given, tmp_path)
    assert "window + 1 is 513, the served context 512" in error.value.message
    assert "input_tokens + output_tokens is 600" in error.value.message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"text": "a"}\n\n{"text": "b"\n', ":3: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8"),
        (b'\n{"prompt": "a"}\n["text"]\n', ":2: neither `messages` nor `text`"),
        (b'{"text": "  "}\n{"messages": []}\n', ":1: empty text"),
        (b'{"text": "a"}\n{"prompt": "b"}\n', ""),  # the run counts what it drops
        (b'{"text": "a"}\n{"messages": [{"role": "user", "content": "x"}]}\n', ":2: 1 rows have"),
    ],
)
def test_calibration_rows(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    found = check_calibration(path, has_chat_template=False)
    assert [fault in finding.message for finding in found] == ([True] if fault else [])
    if "rows have" in fault:
        assert check_calibration(path, has_chat_template=True) == []
        assert check_calibration(path, has_chat_template=None) == []


def test_other_calibration_files(tmp_path: Path) -> None:
    def found(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return " ".join(
            f.message for f in check_calibration(tmp_path / name, has_chat_template=True)
        )

    assert found("a.txt", b"Some text.\n\nMore.") == ""
    assert "is empty" in found("b.txt", b" \n\n")
    assert "b.txt:2: not UTF-8" in found("b.txt", b"fine\n\xe4\n")
    assert "is empty" in found("c.parquet", b"")
    assert "not a complete parquet" in found("d.parquet", b"PAR1" + b"x" * 20)
    assert found("e.parquet", b"PAR1" + b"x" * 20 + bytes([20, 0, 0, 0]) + b"PAR1") == ""
    assert "not a complete" in found(
        "f.parquet", b"PAR1" + b"x" * 20 + b"PAR1"
    )  # a footer that lies
    for start, footer, end in (
        (b"PAR1", 21, b"PAR1"),
        (b"PARE", 20, b"PAR1"),
        (b"PAR1", 20, b"PARE"),
    ):
        content = start + b"x" * 20 + bytes([footer, 0, 0, 0]) + end
        assert "not a complete" in found("g.parquet", content)
    missing = check_calibration(tmp_path / "nowhere.jsonl", has_chat_template=True)
    assert "does not exist" in missing[0].message


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be held in memory before anyone knew how long it is."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * (4 << 20))
    monkeypatch.setattr(rows, "LINE_LIMIT_BYTES", 1 << 10)
    tracemalloc.start()
    try:
        (finding,) = check_calibration(path, has_chat_template=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "rows.jsonl:1: a line of more than" in finding.message
    assert peak < 1 << 20


def test_only_the_start_of_a_large_file_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100 + b"not JSON\n")
    assert "rows.jsonl:101" in check_calibration(path, has_chat_template=True)[0].message
    monkeypatch.setattr(calibration_checks, "SCAN_LIMIT_BYTES", 1000)
    assert check_calibration(path, has_chat_template=True) == []


def test_messages_need_a_template_unless_an_adapter_may_bring_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", template=None)
    with pytest.raises(SourceError, match="no chat template"):
        preflight(resolved(tmp_path, recipe(), model=folder), tmp_path)
    adapter = write_adapter(tmp_path / "adapter", read_checkpoint(folder))
    preflight(resolved(tmp_path, recipe(), model=folder, adapter=adapter), tmp_path)


def test_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(resource_checks, "SLACK_BYTES", 1 << 60)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 1000})())
    with pytest.raises(ResourceError) as error:
        preflight(resolved(tmp_path, recipe(), model=folder), tmp_path / "a" / "store")
    calibration = recipe().calibration
    assert calibration is not None
    tokens = calibration.samples * 128  # and their hidden states before and behind a layer
    needed = (1 << 60) + promised_bytes(read_checkpoint(folder), recipe())
    needed += tokens * (12 + 2 * 2 * HIDDEN)
    assert f"this run writes about {needed}" in error.value.message
    assert "compress needs" in error.value.message
    assert "the layer that is read ahead" in error.value.message


@pytest.mark.parametrize(
    ("keys", "architecture", "whole"),
    [
        ({}, "LlamaForCausalLM", False),
        ({"engine": "llmcompressor"}, "LlamaForCausalLM", True),
        ({}, "OtherForCausalLM", True),
    ],
)
def test_what_is_held_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    architecture: str,
    whole: bool,
) -> None:
    """Half of a checkpoint of 30 layers holds a pair of them and what is computed of one."""
    config = llama_config(layers=30) | {"architectures": [architecture]}
    folder = write_checkpoint(tmp_path / "checkpoint", llama_tensors(layers=30), config)
    total = read_checkpoint(folder).weight_bytes // 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": total})())
    given = resolved(tmp_path, recipe(**awq(**keys)), model=folder)
    if whole:
        with pytest.raises(ResourceError, match=r"compress needs .* \(the checkpoint "):
            preflight(given, tmp_path)
    else:
        preflight(given, tmp_path)


def test_what_an_artifact_takes(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    fp8 = recipe(quantize={"method": "fp8", "scheme": "FP8"})
    linears = sum(info.elements for info in checkpoint.layer_linears())
    kept = checkpoint.weight_bytes - 2 * linears
    assert promised_bytes(checkpoint, fp8) == kept + linears + 14 * 2 * 2  # two BF16 scales each


def test_what_an_artifact_takes_in_another_format(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    plain = {"method": "gptq", "group_size": 32}
    ours = promised_bytes(checkpoint, recipe(quantize=plain))
    linears = checkpoint.layer_linears()
    zeros = sum(info.elements // 32 // 2 for info in linears)  # 4 bits for each group
    shapes = 16 * len(linears)  # compressed-tensors' weight_shape
    asked = recipe(quantize=plain | {"format": "awq"})
    assert promised_bytes(checkpoint, asked) == ours + zeros - shapes
    assert promised_bytes(checkpoint, asked, "compressed-tensors") == ours
    asked = recipe(quantize=plain | {"format": "gptq"})
    g_idx = sum(4 * info.shape[1] for info in linears)
    assert promised_bytes(checkpoint, asked) == ours + zeros + g_idx - shapes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "awq", "ignore": []}, "format awq cannot hold a quantized lm_head"),
        (
            {"format": "awq", "ignore": ["lm_head", "model.layers.0.mlp.gate"]},
            "model.layers.0.mlp.gate left out while model.layers.0.mlp.gate_proj is quantized",
        ),
        ({"format": "awq"}, "odd_proj.weight [12, 128]: 12 outputs are no multiple of 8"),
        ({"format": "gptq"}, "odd_proj.weight [12, 128]: 12 outputs are no multiple of 8"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"]
    dtype, values = tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.odd_proj.weight"] = (dtype, values[:12])
    folder = write_checkpoint(tmp_path, tensors)
    asked = recipe(quantize={"method": "awq", "group_size": 32} | keys)
    said = [finding.message for finding in check_schemes(read_checkpoint(folder), asked)]
    assert any(message in one for one in said), said


def test_what_a_mixed_artifact_takes(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    plain = {"method": "fp8"}
    qkv = {"modules": ["re:.*[qkv]_proj$"], "scheme": "MXFP4A16"}
    difference = promised_bytes(checkpoint, recipe(quantize=plain)) - promised_bytes(
        checkpoint, recipe(quantize=plain | {"overrides": [qkv]})
    )
    rows, columns = 2 * (128 + 64 + 64), 128  # two layers
    fp8, mxfp4 = rows * (columns + 2), rows * (columns // 2 + columns // 32)
    assert difference == fp8 - mxfp4


def test_a_checkpoint_is_checked_for_its_recipe(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert check_checkpoint(folder, recipe()) == []
    assert "group size 48" in check_checkpoint(folder, recipe(**awq(group_size=48)))[0].message
    (folder / "config.json").unlink()
    assert "no config.json" in check_checkpoint(folder, recipe())[0].message


@pytest.mark.parametrize(("token", "allowed"), [(TOKEN, True), (READ_TOKEN, False)])
def test_a_token_must_be_allowed_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, allowed: bool
) -> None:
    online(monkeypatch)
    folder = write_checkpoint(tmp_path / "checkpoint")
    given = resolved(tmp_path, recipe(publish={"hub": {"repo": "ann/tiny"}}), model=folder)
    monkeypatch.setenv("HF_TOKEN", token)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        if allowed:
            preflight(given, tmp_path)
        else:
            with pytest.raises(CredentialsError, match="may only read"):
                preflight(given, tmp_path)
            preflight(given, tmp_path, online=False)


def test_what_does_not_fit_on_the_hub_is_found_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    folder = write_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.hub.create("model", "ann/tiny", private=False)
        hub = {"repo": "ann/tiny"}
        with pytest.raises(ConflictError, match=r"but publish\.hub\.private is true"):
            preflight(resolved(tmp_path, recipe(publish={"hub": hub}), model=folder), tmp_path)
        hub["collection"] = "ann/none-0"
        both = resolved(tmp_path, recipe(publish={"hub": hub}), model=folder)
        with pytest.raises(UsageError, match="2 things") as error:  # the lowest exit code
            preflight(both, tmp_path)
        assert "is public" in error.value.message
        preflight(both, tmp_path, {"compress", "measure"})  # published already


@pytest.mark.parametrize("taken", ["model", "adapter", "base", "store"])
@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_what_is_published_keeps_clear_of_what_is_read(
    taken: str, place: str, tmp_path: Path
) -> None:
    names = ("model", "adapter", "base", "store", "calibration")
    folders = {name: tmp_path / name / "folder" for name in names}
    made = recipe(publish={"folder": str(folders[taken] / place)})
    store = folders.pop("store")
    (finding,) = parts.check_folder(resolved(tmp_path, made, **folders), store)
    assert f"overlaps {tmp_path / taken / 'folder'}, which is in use" in finding.message
    elsewhere = recipe(publish={"folder": str(tmp_path / "out")})
    assert parts.check_folder(resolved(tmp_path, elsewhere, **folders), store) == []
