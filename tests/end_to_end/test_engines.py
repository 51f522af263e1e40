"""AutoAWQ and GPTQModel on the shipped checkpoint, in their own environments.

What is unpacked here is unpacked by the formats' descriptions alone, with nothing of the package's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.engines import ENGINES
from tests.end_to_end.conftest import ROOT, Work, environment

pytestmark = pytest.mark.end_to_end

SOURCE = ROOT / "examples" / "tiny_llama" / "instruct"
LINEARS = 4 * 7  # q, k, v, o, gate, up and down of each layer
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble, from the lowest

Tensors = dict[str, np.ndarray]


def read(folder: Path) -> Tensors:
    """All tensors of a folder; BF16 and F16 as FP32."""
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + place for place in entry["data_offsets"])
                found[name] = values(data[start:end], entry["dtype"]).reshape(entry["shape"])
    return found


def values(raw: bytes, dtype: str) -> np.ndarray:
    match dtype:
        case "BF16":
            return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        case "F16":
            return np.frombuffer(raw, "<f2").astype("<f4")
        case "I32":
            return np.frombuffer(raw, "<i4").view("<u4")
    raise AssertionError(dtype)


def spread(packed: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """(n, words) → (n, words * 32/bits): the part k of a word, from the lowest, is order[k]."""
    parts = np.empty((*packed.shape, len(order)), dtype=np.int64)
    for place, column in enumerate(order):
        parts[..., column] = (packed >> np.uint32(place * bits)) & (2**bits - 1)
    return parts.reshape(packed.shape[0], -1)


def from_awq(tensors: Tensors, module: str, group: int) -> np.ndarray:
    """(q - z) * s, as (out_features, in_features); packed along the outputs."""
    q = spread(tensors[f"{module}.qweight"], 4, AWQ_ORDER)  # (in, out)
    zeros = spread(tensors[f"{module}.qzeros"], 4, AWQ_ORDER)  # (groups, out)
    scales = tensors[f"{module}.scales"]
    rows = np.arange(q.shape[0]) // group
    return ((q - zeros[rows]) * scales[rows]).T


def from_gptq(tensors: Tensors, module: str, bits: int) -> np.ndarray:
    """(q - z - 1) * s of the group that g_idx names; q packed along the inputs, z along outputs."""
    order = tuple(range(32 // bits))
    q = spread(tensors[f"{module}.qweight"].T, bits, order).T  # (in, out)
    zeros = spread(tensors[f"{module}.qzeros"], bits, order) + 1
    groups = tensors[f"{module}.g_idx"].astype(np.int64)
    return ((q - zeros[groups]) * tensors[f"{module}.scales"][groups]).T


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.fixture(scope="session")
def compress(work: Work) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """The folder and `compress.json` of a shipped recipe, up to its compress stage."""

    def run(recipe: str, *settings: str) -> tuple[Path, dict[str, Any]]:
        result = work.run(recipe, "--until", "compress", *settings)
        (key,) = [stage["key"] for stage in result["stages"] if stage["id"] == "compress"]
        folder = work.store / "compress" / key
        return folder / "model", json.loads((folder / "compress.json").read_text())

    return run


def check_frame(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What holds for either: the source's config and files, all linears; what it says of itself."""
    assert len(told["quantized"]) == LINEARS
    assert told["calibrated"]
    assert told["peak_memory_bytes"] > 10**8
    assert set(told["versions"]) >= {"torch", "transformers"}
    config = json.loads((folder / "config.json").read_text())
    quantization: dict[str, Any] = config.pop("quantization_config")
    assert config == json.loads((SOURCE / "config.json").read_text())
    assert str(folder.parents[3]) not in json.dumps(quantization)  # no path of this machine
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (SOURCE / name).read_bytes()
    allowed = {path.name for path in SOURCE.iterdir()} | {"model.safetensors"}
    assert {path.name for path in folder.iterdir()} <= allowed
    return quantization


def test_autoawq(compress: Callable[..., tuple[Path, dict[str, Any]]]) -> None:
    folder, told = compress("tiny-llama-autoawq")
    quantization = check_frame(folder, told)
    assert quantization == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 128,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    ours, theirs = read(folder), read(SOURCE)
    # AWQ moves scales between a norm and the linears behind it: their products are compared
    for layer in range(4):
        for norm, linear in MOVED:
            module = f"model.layers.{layer}.{linear}"
            scale = f"model.layers.{layer}.{norm}.weight"
            made = from_awq(ours, module, 128) * ours[scale]
            assert cosine(made, theirs[f"{module}.weight"] * theirs[scale]) > 0.98, module
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert np.array_equal(ours[name], theirs[name])
    # every token id that the other engines see, but for the rest behind the last whole row
    tokens = told["rows"] * told["row_tokens"]
    assert 0 <= ids_of(folder) - tokens < told["row_tokens"]


def ids_of(folder: Path) -> int:
    """Token ids in the calibrate stage's artifact that this one was made of."""
    key = json.loads((folder.parent / "manifest.json").read_text())["key_inputs"]["inputs"]
    path = folder.parents[2] / "calibrate" / key["calibrate"] / "tokens.npz"
    return int(np.load(path)["ids"].size)


@pytest.mark.parametrize(
    ("scheme", "bits", "least"),
    [
        ("W4A16", 4, 0.95),
        pytest.param("W4A16_ASYM", 4, 0.95, marks=pytest.mark.slow),
        pytest.param("W8A16", 8, 0.999, marks=pytest.mark.slow),
    ],
)
def test_gptqmodel(
    compress: Callable[..., tuple[Path, dict[str, Any]]], scheme: str, bits: int, least: float
) -> None:
    settings = ["--set", f"quantize.scheme={scheme}"]
    if scheme != "W4A16":
        settings += ["--set", "calibration.samples=16"]
    folder, told = compress("tiny-llama-gptqmodel", *settings)
    quantization = check_frame(folder, told)
    assert quantization["quant_method"] == "gptq"
    assert quantization["checkpoint_format"] == "gptq"
    assert (quantization["bits"], quantization["group_size"]) == (bits, 128)
    assert quantization["sym"] is (scheme != "W4A16_ASYM")
    assert quantization["desc_act"] is False
    assert quantization["meta"]["act_group_aware"] is True
    assert quantization["meta"]["damp_percent"] == 0.01
    ours, theirs = read(folder), read(SOURCE)
    for module in told["quantized"]:
        made = from_gptq(ours, module, bits)
        assert cosine(made, theirs[f"{module}.weight"]) > least, module
        # groups lie where they are: a server needs no permutation
        assert np.array_equal(ours[f"{module}.g_idx"], np.arange(made.shape[1]) // 128)
    packed = {f"{module}.{part}" for module in told["quantized"] for part in PARTS}
    assert ours.keys() - packed == {
        name for name in theirs if name.rpartition(".")[0] not in told["quantized"]
    }
    for name in ours.keys() - packed:
        assert np.array_equal(ours[name], theirs[name])


MOVED = (
    ("input_layernorm", "self_attn.q_proj"),
    ("input_layernorm", "self_attn.k_proj"),
    ("post_attention_layernorm", "mlp.gate_proj"),
)
"""Linears whose scales go into a norm alone; those of v and up are scaled on both sides."""

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize("engine", [pytest.param("autoawq", marks=pytest.mark.slow), "gptqmodel"])
def test_ignored_modules_stay_as_they_are(
    compress: Callable[..., tuple[Path, dict[str, Any]]], engine: str
) -> None:
    """One module of one layer, which AutoAWQ by itself cannot name."""
    left = "model.layers.2.mlp.down_proj"
    folder, told = compress(
        f"tiny-llama-{engine}",
        *("--set", f"quantize.ignore=[lm_head, {left}]", "--set", "calibration.samples=16"),
    )
    assert left not in told["quantized"]
    assert len(told["quantized"]) == LINEARS - 1
    ours, theirs = read(folder), read(SOURCE)
    assert ours[f"{left}.weight"].shape == theirs[f"{left}.weight"].shape
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if engine == "autoawq":
        assert config["modules_to_not_convert"] == [left]
    else:
        assert np.array_equal(ours[f"{left}.weight"], theirs[f"{left}.weight"])
        assert list(config["dynamic"]) == [r"-:^model\.layers\.2\.mlp\.down_proj$"]


@pytest.mark.parametrize("engine", [pytest.param("autoawq", marks=pytest.mark.slow), "gptqmodel"])
def test_killed_and_run_again(work: Work, tmp_path: Path, engine: str) -> None:
    """After SIGKILL in the middle of its layers: no process is left, the next run is whole."""
    store = tmp_path / "store"
    command = work.command("run", f"tiny-llama-{engine}", "--store", str(store))
    command += ["--until", "compress", "--set", "calibration.samples=16"]
    process = subprocess.Popen(
        command,
        cwd=work.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 900
    while not any('"quantizing"' in path.read_text() for path in store.rglob("*events*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(store.glob("compress/*/manifest.json"))
    again = subprocess.run(
        command, cwd=work.folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    (manifest,) = store.glob("compress/*/manifest.json")
    told = json.loads((manifest.parent / "compress.json").read_text())
    assert len(told["quantized"]) == LINEARS
    assert not (manifest.parent / "offload").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["autoawq", "gptqmodel"])
def test_every_model_type_of_the_table(
    environment_python: Callable[[str], Path], tmp_path: Path, engine: str
) -> None:
    """All linears of both layers: what `cannot_read` lets through is quantized."""
    kinds = sorted(ENGINES[engine].MODEL_TYPES)  # type: ignore[attr-defined]
    driver = Path(__file__).with_name("own_engines.py")
    subprocess.run(
        [environment_python(engine), driver, engine, tmp_path, *kinds],
        env=environment(),
        capture_output=True,
        check=True,
    )
    told = json.loads((tmp_path / "told.json").read_text())
    assert {kind: said for kind, said in told.items() if isinstance(said, str) or said < 8} == {}
