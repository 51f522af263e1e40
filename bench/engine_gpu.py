"""The engines on a GPU: seconds a layer, device memory, share of the card's BF16 rate.

    ENVIRONMENT/bin/python bench/engine_gpu.py --scratch FOLDER > table.md

ENVIRONMENT is the llmcompressor environment. Builds random BF16 checkpoints of the shapes of
Llama-3.1-8B and Llama-3.1-70B with a few layers and the whole vocabulary, and calibration data of
256 x 2048 random tokens, and runs every method in a fresh process, engines interleaved. Random
weights cost what trained ones cost; what they lose says nothing. FOLDER takes up to 45 GB.
On a GPU the table also goes to bench/engine_gpu.md; `--cpu-dry-run` runs tiny shapes on the CPU to
try the script, and writes no file.

Seconds of a whole model are extrapolated: what is not a layer (start-up, embedding, checks) counted
once, plus the inner layers' seconds times all layers but one, plus the last layer's, which hands
nothing on. The first layer warms up; it counts as an inner one only where there is no other.

Useful floating-point operations of a layer, for T tokens in sequences of S, P weights in the
layer's linears, hidden size d (multiply and add are two):

- a forward pass: 2 P T + 2 S d T; the second term is attention, half of PaLM's 4 S d a token
  (arXiv:2204.02311, appendix B), as a causal kernel computes half. AWQ runs one pass. With GPTQ
  there are two, the first of which ends before the last linear.
- Gram matrices: t n^2 for each distinct input of n columns (symmetric: half of 2 t n^2) and the t
  tokens that are taken up, which sensitivity.json says.
- AWQ's grid: 2 r n^2 a grid point and linear, from r sampled rows; the sensitivity record likewise.
- GPTQ: n^3 / 3 for each factorisation (LAPACK working note 41) and R n^2 for the columns of R rows:
  column k adds the errors of k columns before it, 2 R k.

The last two run in float32; all are divided by the card's dense BF16 rate.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bench.predicted import peaks  # noqa: E402
from bench.random_llama import SHAPES, Shape  # noqa: E402
from quantize.protocol import Request, load_result, write_json  # noqa: E402

REPORT = Path(__file__).with_suffix(".md")
WORKERS = {"stream": "stream", "oneshot": "oneshot"}
REAL = ("8B", "70B")
METHODS: dict[str, tuple[str, int | None]] = {
    "awq": ("W4A16_ASYM", 128),
    "gptq": ("W4A16", 128),
    "awq+gptq": ("W4A16_ASYM", 128),
    "fp8": ("FP8_DYNAMIC", None),
}
TOKENIZER = ROOT / "examples" / "tiny_llama" / "base"
SAMPLE_SECONDS = 0.2

# Dense BF16 with float32 accumulation, TFLOP/s; the first name that is in the card's wins.
RATES = (
    ("H100 PCIe", 756.0),  # NVIDIA H100 data sheet: 1,513 with sparsity
    ("H100 NVL", 835.0),  # the same: 1,671 with sparsity
    ("H100", 989.4),  # SXM, the same: 1,979 with sparsity
    ("H200 NVL", 835.5),  # NVIDIA H200 data sheet: 1,671 with sparsity
    ("H200", 989.4),  # SXM, the same: 1,979 with sparsity
    ("A100", 312.0),  # NVIDIA A100 data sheet, without sparsity
    ("L40S", 362.05),  # NVIDIA L40S data sheet, without sparsity
    ("4090", 165.2),  # NVIDIA Ada architecture white paper, table 2: FP32 accumulate, dense
)


@dataclass(frozen=True)
class Work:
    """What the operations of a layer are counted from."""

    shape: Shape
    tokens: int
    length: int
    taken: int  # tokens in the Gram matrices
    rows: int  # that AWQ's grid looks at
    points: int  # of AWQ's grid
    recorded_rows: int  # that the sensitivity record looks at
    candidates: int  # of the sensitivity record

    def operations(self, method: str) -> float:
        """Useful floating-point operations of an inner layer; the formula is the module's."""
        if method == "fp8":
            return 0.0
        shape, total = self.shape, 0.0
        passes = 2 if "gptq" in method else 1
        attention = 2 * self.length * shape.hidden * self.tokens
        total += passes * (2 * shape.parameters * self.tokens + attention)
        if passes == 2:
            total -= 2 * shape.hidden * shape.inner * self.tokens
        inputs = (shape.hidden, shape.hidden, shape.hidden, shape.inner)
        total += sum(self.taken * columns**2 for columns in inputs)
        for rows, columns in shape.linears.values():
            recorded = min(rows, self.recorded_rows) * (self.candidates + 1)
            total += 2 * recorded * columns**2
            if "awq" in method:
                total += 2 * min(rows, self.rows) * self.points * columns**2
            if "gptq" in method:
                total += rows * columns**2
        if "gptq" in method:
            total += sum(columns**3 / 3 for columns in inputs)
        return total


@dataclass(frozen=True)
class Measured:
    """One run. `layers` are seconds each; `device_bytes` is None without a GPU."""

    seconds: float
    layers: list[float]
    device_bytes: int | None
    allocated_bytes: int | None
    host_bytes: int
    taken: int

    @property
    def inner(self) -> float:
        """Seconds of a layer that has others on both sides, where there is one."""
        return statistics.median(self.layers[1:-1] or self.layers[:1])

    def whole(self, layers: int) -> float:
        """Extrapolated seconds of a model with so many layers."""
        outside = self.seconds - sum(self.layers)
        return outside + self.inner * (layers - 1) + self.layers[-1]


def main() -> None:
    options = arguments()
    card = None if options.cpu_dry_run else Card.find()
    names = ["tiny"] if options.cpu_dry_run else options.shapes
    samples, length = (16, 64) if options.cpu_dry_run else (options.samples, options.length)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(heading(card, samples, length))
    for shape in (SHAPES[name] for name in names):
        folder = options.scratch / f"{shape.name}-{os.getpid()}"
        build(shape, folder, samples, length)
        try:
            for method in options.methods:
                for engine in options.engines:
                    say(row(engine, method, shape, folder, samples, length, card))
        finally:
            shutil.rmtree(folder)
    if card is not None:
        REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--engines", nargs="+", choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--cpu-dry-run", action="store_true")
    return parser.parse_args()


@dataclass(frozen=True)
class Card:
    """The GPU that is measured: the first one."""

    name: str
    driver: str
    bytes: int

    @classmethod
    def find(cls) -> Card:
        """Ask nvidia-smi: a CUDA context here would take memory from what is measured."""
        try:
            name, driver, mebibytes = _smi("name,driver_version,memory.total")
        except (OSError, subprocess.CalledProcessError):
            sys.exit("no NVIDIA GPU here: --cpu-dry-run tries the script without one")
        return cls(name, driver, int(mebibytes) << 20)

    @property
    def rate(self) -> float | None:
        """Dense BF16 operations a second; None where the table does not have it."""
        return next((rate * 1e12 for part, rate in RATES if part in self.name), None)


def _smi(fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [field.strip() for field in done.stdout.split(",")]


def heading(card: Card | None, samples: int, length: int) -> str:
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    where = "the CPU: a dry run of the script, not a measurement"
    if card is not None:
        rate = f"{card.rate / 1e12:.0f} TFLOP/s" if card.rate else "unknown"
        where = f"{card.name} ({card.bytes / 2**30:.0f} GiB, driver {card.driver}; BF16 {rate})"
    return f"""# The engines on a GPU

On {where}, Python {platform.python_version()}, {versions}; {samples} x {length} random tokens.

```
python {" ".join(sys.argv)}
```

"Layer" is an inner layer's seconds. "Device" is the most memory that the card had in use beyond
what it had before; "tensors" is the most that torch had allocated. "Whole" is extrapolated from the
measured layers; embedding and start-up counted once. The memory of `oneshot` is that of the few
layers: it holds the whole model. "Host" is the process's highest resident size. "Expected" is what
docs/capacity.md computes for the column before it.

| engine | method | shape, layers | layer, s | tokens/s | BF16 rate | device | tensors | whole |\
 expected tensors | host | expected |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def build(shape: Shape, folder: Path, samples: int, length: int) -> None:
    """The checkpoint, a shard a layer, in a process of its own, and the tokens."""
    folder.mkdir(parents=True)
    maker = Path(__file__).with_name("random_llama.py")
    command = [sys.executable, str(maker), shape.name, str(folder / "model")]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment())
    for path in TOKENIZER.glob("*token*"):  # `oneshot` wants one, and never asks it anything
        shutil.copyfile(path, folder / "model" / path.name)
    random = np.random.default_rng(0)
    ids = random.integers(0, shape.vocabulary, samples * length).astype(np.int32)
    np.savez(folder / "tokens.npz", ids=ids, offsets=np.arange(samples + 1) * length)


def environment() -> dict[str, str]:
    """The first GPU only; nothing from the Hub."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": first,
        "HF_HUB_OFFLINE": "1",
    }


def row(
    engine: str,
    method: str,
    shape: Shape,
    folder: Path,
    samples: int,
    length: int,
    card: Card | None,
) -> str:
    """One run, as a line of the table."""
    start = f"| {engine} | {method} | {shape.name}, {shape.layers} of {shape.whole} |"
    try:
        measured = measure(engine, method, folder, card)
    except Failed as failure:
        return f"{start} {failure} | | | | | | | | |"
    tokens, seconds = samples * length, measured.inner
    speed = f"{tokens / seconds:,.0f}" if method != "fp8" else "no data"
    share = "–"
    if card is not None and card.rate is not None and engine == "stream" and method != "fp8":
        done = work(shape, tokens, length, measured.taken).operations(method)
        share = f"{done / seconds / card.rate:.1%}"
    expected: tuple[int | None, int | None] = (None, None)
    if engine == "stream":
        expected = peaks(shape, method, samples, length, card and card.bytes)
    device, allocated, host, on_host, on_device = (
        f"{size / 2**30:.1f} GiB" if size is not None else "–"
        for size in (
            measured.device_bytes,
            measured.allocated_bytes,
            measured.host_bytes,
            *expected,
        )
    )
    whole = f"{measured.whole(shape.whole):,.0f} s from {shape.layers} layers"
    columns = (f"{seconds:.3g}", speed, share, device, allocated, whole, on_device, host, on_host)
    return f"{start} {' | '.join(columns)} |"


def work(shape: Shape, tokens: int, length: int, taken: int) -> Work:
    """How the engine searches is read from the engine."""
    from quantize.engine import awq, sensitivity

    return Work(
        shape=shape,
        tokens=tokens,
        length=length,
        taken=taken,
        rows=awq.SAMPLED_ROWS,
        points=len(awq.GRID),
        recorded_rows=sensitivity.ROWS,
        candidates=len(sensitivity.CANDIDATES),
    )


class Failed(Exception):
    """Why a run gave no figures, for the table."""


def measure(engine: str, method: str, folder: Path, card: Card | None) -> Measured:
    """Run a worker in a fresh process and folder."""
    place = folder / "run"
    for made in (place / "work", place / "out" / "model"):
        made.mkdir(parents=True)
    files = [str(place / "request.json"), str(place / "result.json")]
    write_json(files[0], vars(request(engine, method, folder, place)))
    command = [sys.executable, "-P", "-m", f"quantize.workers.{WORKERS[engine]}", *files]
    try:
        with used_memory(card) as most:
            subprocess.run(command, stdout=sys.stderr, env=environment(), check=False)
        if not Path(files[1]).exists():
            raise Failed("killed")
        result = load_result(files[1])
        if not result.ok:
            print(f"{engine} {method}: {result.message}", file=sys.stderr)
            raise Failed("out of memory" if result.kind == "ResourceError" else "failed")
        layers = (
            [layer["seconds"] for layer in result.body["layers"]]
            if engine == "stream"
            else by_events(place / "events.jsonl", result.body["seconds"])
        )
        record = place / "out" / "sensitivity.json"
        taken = json.loads(record.read_text())["tokens"] if record.exists() else 0
        peak = result.body["peak_device_bytes"] if card is not None else None
        host = result.body["peak_memory_bytes"]
        return Measured(result.body["seconds"], layers, most and most[0], peak, host, taken)
    finally:
        shutil.rmtree(place)


def request(engine: str, method: str, folder: Path, place: Path) -> Request:
    scheme, group_size = METHODS[method]
    body: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": str(place / "out" / "model"),
        "tokens": None if method == "fp8" else str(folder / "tokens.npz"),
        "method": method,
        "scheme": scheme,
        "group_size": group_size,
        "ignore": ["lm_head"],
        "overrides": [],
        "kv_cache": None,
        "dampening": 0.01,
        "activation_order": "static",
        "copy": [],
    }
    return Request(WORKERS[engine], body, str(place / "work"), str(place / "events.jsonl"))


def by_events(path: Path, seconds: float) -> list[float]:
    """Mean seconds of a layer, once for each, from the progress that `oneshot` reports.

    It reports every quarter of a second, and its layers are alike: the last one is handed on, too.
    A data-free method goes through all weights at once, without progress: no seconds a layer.
    """
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said = [event for event in events if event.get("what") == "quantizing"]
    if not said or said[-1]["time"] - said[0]["time"] < SAMPLE_SECONDS:
        raise Failed(f"{seconds:.1f} in all")
    layers = int(said[-1]["total"])
    return [(said[-1]["time"] - said[0]["time"]) / layers] * layers


@contextmanager
def used_memory(card: Card | None) -> Iterator[list[int] | None]:
    """The most bytes in use on the card inside, beyond those before, as a list of one."""
    if card is None:
        yield None
        return
    before = int(_smi("memory.used")[0]) << 20
    most, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], (int(_smi("memory.used")[0]) << 20) - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield most
    finally:
        ended.set()
        sampler.join()


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
