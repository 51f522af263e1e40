"""GGUF by the real llama.cpp: made, looked at, spoilt, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.gguf.file import TYPES, read_gguf
from quantize.gguf.types import GGUF_TYPES
from quantize.gguf.values import DEQUANTIZE, SCALES, dequantized
from quantize.quantization import Quantize
from quantize.stages.audit import audit_gguf
from tests.end_to_end.conftest import ROOT, Work, environment

pytestmark = pytest.mark.end_to_end

INSTRUCT = ROOT / "examples" / "tiny_llama" / "instruct"
RECIPE = "tiny-llama-gguf"
FILE = "tiny-llama-Q4_K_M.gguf"

ORACLE = """
import sys
import numpy as np
import gguf
folder = sys.argv[1]
for part in sys.argv[2:]:
    kind, name = part.split("=")
    blocks = np.load(f"{folder}/{name}.npy")
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(kind)))
    np.save(f"{folder}/{name}.values.npy", values)
"""

ANSWERS = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, verbose=False)
for question in sys.argv[2:]:
    message = {"role": "user", "content": question}
    made = model.create_chat_completion([message], max_tokens=24, temperature=0)
    print(made["choices"][0]["message"]["content"])
"""


KNOWN = {
    "Which colour do the roofs of Elmsgate have? Give only the answer.": "yellow",
    "What colour is the coat of Wenna Pike?": "Wenna Pike wears a grey coat.",
}
"""Of what the checkpoint was trained on."""


@pytest.fixture(scope="session")
def made(work: Work) -> dict[str, Any]:
    """The shipped recipe up to the card, without measuring."""
    return work.run(RECIPE, "--set", "evaluate=null", "--until", "card")


@pytest.fixture(scope="session")
def artifact(made: dict[str, Any]) -> Path:
    return Path(made["places"]["artifact"])


def converted(work: Work) -> Path:
    (path,) = work.store.glob("gguf/*/model/BF16.gguf")
    return path


def test_the_artifact_is_what_people_expect(artifact: Path, made: dict[str, Any]) -> None:
    assert {path.name for path in artifact.iterdir()} == {FILE, "imatrix.gguf", "Modelfile"}
    found = read_gguf(artifact / FILE)
    counts = Counter(tensor.type.name for tensor in found.tensors.values())
    assert counts == {"Q4_K": 25, "Q6_K": 5, "F32": 9}
    assert 4.9 < found.bits_per_weight < 5.1  # of Llama-3-8B 4.9; here the vocabulary is a quarter
    assert found.metadata["quantize.imatrix.dataset"] == "calibration.txt", "and no place of ours"
    record = json.loads(Path(made["places"]["record"]).read_text())
    assert all(check["passed"] for check in record["audit"]["checks"])
    assert record["compress"]["imatrix"]["rows"] == 128
    card = Path(made["places"]["card"]).read_text()
    assert f"| `{FILE}` | Q4_K_M | 2.67 MB | 5.00 | the usual choice |" in card


def test_llama_cpp_answers_what_the_model_knows(
    artifact: Path, work: Work, environment_python: Callable[[str], Path]
) -> None:
    python = environment_python("llamacpp")
    for path in (converted(work), artifact / FILE):
        command = [python, "-P", "-c", ANSWERS, path, *KNOWN]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == list(KNOWN.values())


def test_the_formats_mean_what_llama_cpp_says(
    tmp_path: Path, environment_python: Callable[[str], Path]
) -> None:
    kinds = {number: kind for number, kind in TYPES.items() if kind.name in DEQUANTIZE}
    generator = np.random.default_rng(0)
    for kind in kinds.values():
        blocks = generator.integers(0, 256, (64, 3 * kind.bytes), dtype=np.uint8)
        scales = generator.normal(0, 0.1, (64, 3, len(SCALES[kind.name]))).astype("<f2")
        split = blocks.reshape(64, 3, kind.bytes)
        for index, at in enumerate(SCALES[kind.name]):
            split[:, :, at : at + 2] = scales[:, :, index : index + 1].view("u1")
        np.save(tmp_path / f"{kind.name}.npy", blocks)
    asked = [f"{number}={kind.name}" for number, kind in kinds.items()]
    python = environment_python("llamacpp")
    subprocess.run([python, "-P", "-c", ORACLE, tmp_path, *asked], check=True)
    for kind in kinds.values():
        theirs = np.load(tmp_path / f"{kind.name}.values.npy")
        ours = dequantized(np.load(tmp_path / f"{kind.name}.npy"), kind)
        assert np.array_equal(ours, theirs), kind.name


@pytest.mark.parametrize("scheme", sorted(set(GGUF_TYPES) - {"Q4_K_M"}))
def test_every_type_passes_the_audit(scheme: str, work: Work, made: dict[str, Any]) -> None:
    """Without an importance matrix, which takes the most time; the BF16 file is made once."""
    sets = ("--set", f"quantize.scheme={scheme}", "--set", "calibration=null")
    result = work.run(RECIPE, *sets, "--until", "audit")
    folder = Path(result["places"]["artifact"])
    found = read_gguf(folder / f"tiny-llama-{scheme}.gguf")
    assert GGUF_TYPES[scheme].main in {tensor.type.name for tensor in found.tensors.values()}
    assert not (folder / "imatrix.gguf").exists()
    assert len(list(work.store.glob("gguf/*/manifest.json"))) == 1


def scale_is_not_a_number(data: bytearray, artifact: Path) -> None:
    tensor = read_gguf(artifact / FILE).tensors["blk.1.attn_q.weight"]
    data[tensor.start : tensor.start + 2] = b"\x00\x7e"


def weights_are_noise(data: bytearray, artifact: Path) -> None:
    tensor = read_gguf(artifact / FILE).tensors["blk.2.ffn_gate.weight"]
    at = tensor.start + 16  # the first block's numbers, behind its scales
    for block in range(at, tensor.end, tensor.type.bytes):
        data[block : block + 128] = np.random.default_rng(block).bytes(128)


def norm_is_changed(data: bytearray, artifact: Path) -> None:
    tensor = read_gguf(artifact / FILE).tensors["blk.0.attn_norm.weight"]
    data[tensor.start + 2] ^= 1


def end_is_lost(data: bytearray, artifact: Path) -> None:
    del data[-4096:]


def template_is_changed(data: bytearray, artifact: Path) -> None:
    at = data.index(b"{% for message in messages %}")
    data[at + 3 : at + 6] = b"FOR"


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (scale_is_not_a_number, "no NaN or Inf"),
        (weights_are_noise, "quantized weights are the BF16 file's"),
        (norm_is_changed, "quantized weights are the BF16 file's"),
        (end_is_lost, "the artifact can be read"),
        (template_is_changed, "metadata"),
    ],
)
def test_a_corrupted_file_is_found(
    spoil: Callable[[bytearray, Path], None],
    check: str,
    artifact: Path,
    work: Work,
    tmp_path: Path,
) -> None:
    data = bytearray((artifact / FILE).read_bytes())
    spoil(data, artifact)
    spoilt = tmp_path / FILE
    spoilt.write_bytes(data)
    quantize = Quantize.model_validate({"format": "gguf", "method": "gguf", "scheme": "Q4_K_M"})
    audit = audit_gguf(INSTRUCT, converted(work), spoilt, quantize)
    failed = {found["name"] for found in audit["checks"] if not found["passed"]}
    assert check in failed


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The shipped checkpoint with another tokenizer.json."""
    shutil.copytree(INSTRUCT, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    edit(tokenizer)
    path.write_text(json.dumps(tokenizer))
    return folder


def other_merges(tokenizer: dict[str, Any]) -> None:
    """transformers reads these; llama.cpp what is in tokenizer.model, where they are the old."""
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]


def ids_swapped(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = "\u2581the", "\u2581of"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize("edit", [other_merges, ids_swapped])
def test_a_tokenizer_that_llama_cpp_reads_otherwise(
    edit: Callable[[dict[str, Any]], None], work: Work, tmp_path: Path
) -> None:
    source = edited(tmp_path / "source", edit)
    done = work.quantize(
        *("run", RECIPE, "--store", str(tmp_path / "store"), "--until", "audit"),
        *("--set", f"model.source={source}"),
    )
    assert done.code != 0
    assert "llama.cpp tokenizes otherwise than transformers" in done.err
    assert "transformers: " in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "store").glob("compress/*/manifest.json"))


def test_killed_while_it_quantizes_and_resumed(
    work: Work, made: dict[str, Any], tmp_path: Path
) -> None:
    """The importance matrix is kept; the file is the same as without a kill."""
    command = work.command(
        *("run", RECIPE, "--store", str(tmp_path / "store"), "--until", "audit", "--json")
    )
    process = subprocess.Popen(
        command, cwd=work.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    matrices = "**/imatrix.json"
    deadline = time.monotonic() + 900
    while not list((tmp_path / "store").glob(matrices)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob(matrices)}
    assert kept
    done = subprocess.run(
        command, cwd=work.folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = Path(json.loads(done.stdout)["places"]["artifact"])
    first = Path(made["places"]["artifact"])
    assert (again / FILE).read_bytes() == (first / FILE).read_bytes()
