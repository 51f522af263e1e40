"""The merge worker with the real peft, against the same sum in numpy."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import quantize
from quantize.checkpoint import read_checkpoint
from quantize.protocol import Request, Result, load_result, write_json
from quantize.tensors import TensorInfo, from_float32, load_tensor, read_header, to_float32

pytestmark = pytest.mark.end_to_end

SCALING = 10 / 4  # lora_alpha / r of make_adapter.py


@pytest.fixture
def python(environment_python: Callable[[str], Path]) -> Path:
    return environment_python("llmcompressor")


def run(python: Path, folder: Path, *arguments: str) -> None:
    """Run the environment's interpreter with our package alone beside its own."""
    package = folder / "package"
    if not package.exists():
        package.mkdir()
        (package / "quantize").symlink_to(Path(quantize.__file__).parent)
    env = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(python), "-P", *arguments], env=env, check=False, timeout=300)


def merge(python: Path, folder: Path, kind: str, tokenizer: str = "base") -> Result:
    maker = Path(__file__).with_name("make_adapter.py")
    run(python, folder, str(maker), str(folder / "base"), str(folder / "adapter"), kind)
    names = {"base": "base", "adapter": "adapter", "tokenizer": tokenizer, "output": "merged"}
    body = {key: str(folder / name) for key, name in names.items()}
    request = Request("merge", body, str(folder), str(folder / "events"))
    write_json(folder / "request.json", vars(request))
    paths = [str(folder / "request.json"), str(folder / "result.json")]
    run(python, folder, "-m", "quantize.workers.merge", *paths)
    return load_result(folder / "result.json")


def values(info: TensorInfo) -> np.ndarray:
    return to_float32(load_tensor(info), info.dtype)


def test_the_sum_is_rounded_once(python: Path, tmp_path: Path) -> None:
    result = merge(python, tmp_path, "lora")
    assert result.ok, result.message
    assert result.body["modules"] == 6
    base = read_checkpoint(tmp_path / "base")
    adapter = read_header(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = read_header(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.tensors.keys()
    changed = 0
    for name, info in base.tensors.items():
        wanted = load_tensor(info)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in adapter:
            a = values(adapter[f"{prefix}.lora_A.weight"])  # (r, in)
            b = values(adapter[f"{prefix}.lora_B.weight"])  # (out, r)
            summed = values(info).astype(np.float64) + SCALING * (b.astype(np.float64) @ a)
            wanted = from_float32(summed.astype(np.float32), "BF16")
            changed += not np.array_equal(wanted, load_tensor(info))
        assert merged[name].dtype == "BF16"
        # A sum within an FP32 rounding of a tie between two BF16 values may fall on either side.
        assert np.mean(load_tensor(merged[name]) == wanted) > 0.999
    assert changed == 6


def test_dora_and_trained_modules_are_merged_too(python: Path, tmp_path: Path) -> None:
    result = merge(python, tmp_path, "dora")
    assert result.ok, result.message
    base = read_checkpoint(tmp_path / "base")
    merged = read_header(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.tensors.keys()
    adapter = read_header(tmp_path / "adapter" / "adapter_model.safetensors")
    head = values(adapter["base_model.model.lm_head.weight"])
    assert np.array_equal(load_tensor(merged["lm_head.weight"]), from_float32(head, "BF16"))
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(load_tensor(merged[q_proj]), load_tensor(base.tensors[q_proj]))


@pytest.mark.parametrize(
    ("kind", "tokenizer", "fault"),
    [
        ("ia3", "base", "of type IA3, not LORA"),
        ("tokens", "adapter", "has 1 tokens (<extra>) beyond the base's 11 embeddings"),
    ],
)
def test_what_cannot_be_merged(
    python: Path, tmp_path: Path, kind: str, tokenizer: str, fault: str
) -> None:
    result = merge(python, tmp_path, kind, tokenizer)
    assert (result.ok, result.kind) == (False, "SourceError")
    assert fault in result.message
    assert result.hint
    assert not (tmp_path / "merged").exists()
