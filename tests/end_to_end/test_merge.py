"""The merge worker with the real peft, against the same sums in numpy, and with bugs in it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantize
from quantize.adapter_checks import HARMLESS, REFUSED, check_adapter
from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.tensors import TensorInfo, from_float32, load_tensor, read_header, to_float32
from tests.end_to_end.conftest import environment

pytestmark = pytest.mark.end_to_end

SOUND = (
    *("lora", "rslora", "dora", "patterns", "one_layer", "regex", "embedding", "tied_head"),
    *("tied_saved", "trained_tokens", "tied_trained_tokens", "added_tokens", "tied_added_tokens"),
    *("biased_all", "biased_lora_only", "biased_lora_bias", "eva", "fp16", "fp32"),
)
SABOTAGED = ("scaling", "left_out", "transposed", "saved", "not_a_number")
UNTIED = {"tied_head", "tied_saved", "tied_added_tokens"}


@pytest.fixture(scope="module")
def merged(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Every kind of `merge_kinds.py`, made and merged in one process; what the worker answered."""
    folder = tmp_path_factory.mktemp("kinds")
    run(environment_python("llmcompressor"), Path(__file__).with_name("merge_kinds.py"), folder)
    return folder, json.loads((folder / "results.json").read_text())


def run(python: Path, script: Path, folder: Path) -> None:
    """Run the environment's interpreter with our package alone beside its own."""
    package = folder.with_name("package")
    package.mkdir(exist_ok=True)
    if not (package / "quantize").exists():
        (package / "quantize").symlink_to(Path(quantize.__file__).parent)
    env = environment({"PYTHONPATH": str(package)})
    command = [str(python), "-P", str(script), str(folder)]
    subprocess.run(command, env=env, check=True, timeout=1200)


def values(info: TensorInfo) -> np.ndarray:
    return to_float32(load_tensor(info), info.dtype).astype(np.float64)


def option(config: Mapping[str, Any], key: str, default: str, module: str) -> float:
    """A value of `rank_pattern` or `alpha_pattern` for a module, or the default."""
    for pattern, value in (config[key] or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
            return float(value)
    return float(config[default])


def expected(base: Checkpoint, adapter: Path) -> dict[str, np.ndarray]:
    """The merged tensors by the definitions of the papers, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {name: values(info) for name, info in base.tensors.items()}
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"].copy())
    tensors = {
        name.removeprefix("base_model.model."): values(info)
        for name, info in read_header(adapter / "adapter_model.safetensors").items()
    }
    for name, tensor in tensors.items():  # what replaces the base's
        plain = name.replace(".base_layer.", ".")
        if plain in found:
            found[plain] = tensor
    for name in list(found):
        module = name.removesuffix(".weight").removesuffix(".bias")
        rank = option(config, "rank_pattern", "r", module)
        alpha = option(config, "alpha_pattern", "lora_alpha", module)
        scaling = alpha / (np.sqrt(rank) if config["use_rslora"] else rank)
        if name.endswith(".bias"):
            found[name] = found[name] + scaling * tensors.get(f"{module}.lora_B.bias", 0)
        elif f"{module}.lora_A.weight" in tensors:
            delta = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            found[name] = found[name] + scaling * delta
        elif f"{module}.lora_embedding_A" in tensors:
            delta = tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]
            found[name] = found[name] + scaling * delta.T
        if (magnitude := tensors.get(f"{module}.lora_magnitude_vector")) is not None:
            length = np.linalg.norm(found[name], axis=1)
            found[name] = found[name] * (magnitude / length)[:, None]
        if (rows := tensors.get(f"{module}.token_adapter.trainable_tokens_delta")) is not None:
            found[name] = found[name].copy()
            found[name][config["trainable_token_indices"]] = rows
    return found


@pytest.mark.parametrize("kind", SOUND)
def test_every_sum_is_what_the_definition_says(
    merged: tuple[Path, dict[str, Any]], kind: str
) -> None:
    folder, results = merged
    assert results[kind]["ok"], results[kind]
    base = read_checkpoint(folder / kind / "base")
    assert check_adapter(folder / kind / "adapter", "merge", base) == []
    config = json.loads((folder / kind / "merged" / "config.json").read_text())
    found = read_header(folder / kind / "merged" / "model.safetensors")
    wanted = expected(base, folder / kind / "adapter")
    assert results[kind]["body"]["untied"] == (kind in UNTIED)
    assert config["tie_word_embeddings"] == (base.tied_embeddings and kind not in UNTIED)
    assert found.keys() == wanted.keys() - (
        {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    )
    changed = 0
    for name, info in found.items():
        assert info.dtype == "BF16"
        rounded = from_float32(wanted[name].astype(np.float32), "BF16")
        # A sum within an FP32 rounding of a tie between two BF16 values may fall on either side.
        assert np.mean(load_tensor(info) == rounded) > 0.99, name
        old = base.tensors.get(name)
        changed += (
            old is None or old.shape != info.shape or not np.array_equal(values(old), values(info))
        )
    assert changed >= 2


@pytest.mark.parametrize("kind", SOUND)
def test_the_check_finds_no_more_than_rounding(
    merged: tuple[Path, dict[str, Any]], kind: str
) -> None:
    check = merged[1][kind]["body"]["merge_check"]
    assert check["passed"]
    assert check["positions"] == 4 * 64
    assert "chat template" in check["tokens"]
    # The drawn errors explain what was found, and are far below what the adapter does.
    assert 1 / 3 < check["logit_change"] / check["logit_change_of_rounding"] < 3
    assert check["tolerance"] < check["logit_change_of_adapter"] / 10
    assert 0 <= check["kl"] < 1e-3
    assert check["top1_agreement"] > 0.95


@pytest.mark.parametrize("bug", SABOTAGED)
def test_a_wrong_merge_is_found(merged: tuple[Path, dict[str, Any]], bug: str) -> None:
    result = merged[1][f"sabotaged_{bug}"]
    assert (result["ok"], result["kind"]) == (False, "ToolError")
    assert "not the function of base and adapter" in result["message"]
    assert "nothing was kept" in result["hint"]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("more_tokens", "has 1 tokens (<extra>) beyond the base's 11 embeddings"),
        ("incomplete", "has no tensors for modules that its config names: base_model"),
        ("strange", "has tensors that no module of the base takes: base_model"),
    ],
)
def test_what_cannot_be_merged(merged: tuple[Path, dict[str, Any]], kind: str, fault: str) -> None:
    folder, results = merged
    assert (results[kind]["ok"], results[kind]["kind"]) == (False, "SourceError")
    assert fault in results[kind]["message"]
    assert results[kind]["hint"]
    assert not (folder / kind / "merged").exists()


def test_every_field_that_peft_has_is_decided_on(merged: tuple[Path, dict[str, Any]]) -> None:
    written = json.loads((merged[0] / "lora" / "adapter" / "adapter_config.json").read_text())
    assert written.keys() <= HARMLESS | REFUSED.keys()
