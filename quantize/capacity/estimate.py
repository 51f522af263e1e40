"""Every stage of a plan: host memory, GPU memory, disk, computed from shapes and the recipe.

Nothing is loaded. Where a figure has no formula it is absent (None), never 0; docs/capacity.md
derives what is here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quantize.capacity.parts import BF16, FP32, Decoder, Linear, Part, Peak
from quantize.capacity.serving import (
    ALLOWANCE_BYTES,
    FP8_BYTES,
    attention,
    share_bytes_per_token,
)
from quantize.capacity.streaming import IMPORTS_BYTES, Run, device_peak, host_peak
from quantize.checkpoint import EMBEDDING, LAYER, Checkpoint
from quantize.engines import ENGINES, stream
from quantize.formats import module_formats
from quantize.modules import module_name
from quantize.quantization import Quantize
from quantize.recipe import Recipe
from quantize.source_checks import promised_bytes

CORE_BYTES = 500_000_000
"""A stage without a tool: the interpreter, numpy, and chunks of tensors. An estimate."""

SERVER_BYTES = {"cpu": 3_000_000_000, "cuda": 6_000_000_000}
"""A server's process without weights, and lm-eval beside it. An estimate."""

DRIVER_BYTES = 600_000_000
"""What the driver's context and cuBLAS take of a GPU beside torch's tensors. An estimate."""

RECORDS = Part("records and samples", 256 << 20, spare=True)
"""Logs, samples and log-probabilities of one measurement. An estimate."""

TOKEN_BYTES = 12
"""A calibration token on disk: its id, and its text in rows.jsonl. An estimate."""


@dataclass(frozen=True)
class Needs:
    """What one stage needs. `device` is of each of `gpus` GPUs; None without one."""

    stage: str
    kind: str
    host: Peak
    device: Peak | None
    gpus: int
    disk: tuple[Part, ...]  # in the store, what is removed at its end included

    @property
    def disk_bytes(self) -> int:
        """All that it writes into the store."""
        return sum(part.bytes for part in self.disk)


def decoder(checkpoint: Checkpoint, quantize: Quantize) -> Decoder:
    """The largest layer with its quantized linears, and what is around the layers."""
    formats = module_formats(quantize)
    layers: dict[str, list[str]] = defaultdict(list)
    outside = 0
    for name, info in checkpoint.tensors.items():
        found = LAYER.search(name)
        if found is None:
            outside += info.elements
        else:
            layers[name[: found.end()]].append(name)

    def size(names: Sequence[str]) -> int:
        return sum(checkpoint.tensors[name].elements for name in names)

    prefix, largest = max(layers.items(), key=lambda item: size(item[1]), default=("", []))
    linears = [info for info in checkpoint.linears() if info.name in set(largest)]
    embedding = [i.elements for name, i in checkpoint.tensors.items() if EMBEDDING.search(name)]
    total = max(1, checkpoint.parameters)
    return Decoder(
        hidden=checkpoint.hidden_size or 0,
        layers=len(layers),
        linears=tuple(
            Linear(module_name(info.name).removeprefix(prefix), *info.shape)
            for info in linears
            if formats.rule(module_name(info.name)) is not None
        ),
        layer_elements=size(largest),
        outside_elements=outside,
        embedding_elements=max(embedding, default=0),
        stored_bytes=-(-checkpoint.weight_bytes // total),
    )


def calibration_tokens(recipe: Recipe) -> tuple[int, int]:
    """Tokens of calibration data at most, and of its longest sequence; 0 where none is read."""
    calibration = recipe.calibration
    if calibration is None or not recipe.calibrates:
        return 0, 0
    return calibration.samples * calibration.sequence_length, calibration.sequence_length


def streams(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether the streaming engine takes this checkpoint."""
    asked = recipe.quantize.engine == "stream"
    return asked and stream.leaves(checkpoint.architecture, recipe) is None


def engine_run(recipe: Recipe, device: str) -> Run:
    """How the recipe's engine goes through a layer."""
    tokens, longest = calibration_tokens(recipe)
    return Run(recipe.quantize.method, tokens, longest, device, recipe.quantize.clip)


def stage_needs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: str,
    stages: Sequence[tuple[str, str]],
    *,
    downloads: Collection[str] = (),
    unpacks: bool = False,
) -> list[Needs]:
    """Of each (id, kind); `device` is cpu or cuda.

    :param downloads: ids of the fetch stages whose checkpoint is no folder here
    :param unpacks: the candidate is measured with its weights unpacked to BF16
    """
    found = []
    for stage, kind in stages:
        match kind:
            case "fetch":
                one = _fetch(checkpoint, recipe, stage, stage in downloads)
            case "gguf":
                one = _gguf(checkpoint, stage)
            case "calibrate":
                one = _calibrate(recipe, stage, kind)
            case "compress":
                one = _compress(checkpoint, recipe, stage, device)
            case "adopt":
                artifact = Part("the adopted checkpoint", promised_bytes(checkpoint, recipe))
                one = Needs(stage, kind, _core("copying"), None, 0, (artifact,))
            case "convert":
                one = _convert(checkpoint, recipe, stage)
            case "measure":
                one = _measure(checkpoint, recipe, stage, device, unpacks)
            case _:
                one = _small(stage, kind)
        found.append(one)
    return found


def _core(when: str = "") -> Peak:
    return Peak(when, (Part("interpreter and libraries", CORE_BYTES, spare=True),))


def _small(stage: str, kind: str) -> Needs:
    """Files are read a chunk at a time; a published folder is not in the store."""
    return Needs(stage, kind, _core(), None, 0, ())


def _fetch(checkpoint: Checkpoint, recipe: Recipe, stage: str, downloaded: bool) -> Needs:
    """A download, and a merge: as stored and at least in BF16, with one layer in FP32 beside it.

    The base of a fine-tune is taken to be as large as the checkpoint.
    """
    disk = (Part("the download", checkpoint.weight_bytes),) if downloaded else ()
    if not recipe.model.merges or stage != "fetch":
        return Needs(stage, "fetch", _core(), None, 0, disk)
    in_bf16 = BF16 * checkpoint.parameters
    layer = decoder(checkpoint, recipe.quantize).layer_elements
    host = Peak(
        "merging",
        (
            Part("the checkpoint", max(checkpoint.weight_bytes, in_bf16)),
            Part("one layer in FP32", FP32 * layer),
            Part("interpreter and libraries", IMPORTS_BYTES["cpu"], spare=True),
        ),
    )
    merged = Part("the merged checkpoint", in_bf16)
    return Needs(stage, "fetch", host, None, 0, (*disk, merged))


def _calibrate(recipe: Recipe, stage: str, kind: str) -> Needs:
    tokens, _ = calibration_tokens(recipe)
    host = Peak("", (Part("interpreter and libraries", IMPORTS_BYTES["cpu"], spare=True),))
    return Needs(stage, kind, host, None, 0, (Part("tokens and rows", TOKEN_BYTES * tokens),))


def _gguf(checkpoint: Checkpoint, stage: str) -> Needs:
    """llama.cpp's converter holds one tensor at a time, in FP32 beside its BF16 form."""
    largest = max((info.elements for info in checkpoint.tensors.values()), default=0)
    host = Peak(
        "converting",
        (
            Part("the largest tensor", (FP32 + BF16) * largest),
            Part("interpreter and libraries", IMPORTS_BYTES["cpu"], spare=True),
        ),
    )
    disk = (Part("the checkpoint as GGUF", BF16 * checkpoint.parameters),)
    return Needs(stage, "gguf", host, None, 0, disk)


def _compress_gguf(checkpoint: Checkpoint, recipe: Recipe, stage: str) -> Needs:
    """llama-imatrix maps the BF16 file, which is slow where it does not fit; no GPU is needed."""
    host = Peak(
        "importance matrix" if recipe.calibrates else "",
        (
            Part("the checkpoint, mapped", BF16 * checkpoint.parameters, spare=True),
            Part("interpreter and libraries", IMPORTS_BYTES["cpu"], spare=True),
        ),
    )
    artifact = Part("the quantized file", promised_bytes(checkpoint, recipe))
    return Needs(stage, "compress", host, None, 0, (artifact,))


def _compress(checkpoint: Checkpoint, recipe: Recipe, stage: str, device: str) -> Needs:
    if recipe.quantize.effective_format == "gguf":
        return _compress_gguf(checkpoint, recipe, stage)
    model, run = decoder(checkpoint, recipe.quantize), engine_run(recipe, device)
    written = ENGINES[recipe.quantize.engine].FORMAT
    artifact = Part("the quantized checkpoint", promised_bytes(checkpoint, recipe, written))
    if not streams(checkpoint, recipe):
        on_device = None if device == "cpu" else _whole_on_device(model, run)
        host = _whole(checkpoint, model, run, WIDTHS.get((recipe.quantize.engine, device), BF16))
        return Needs(stage, "compress", host, on_device, int(device == "cuda"), (artifact,))
    between = Part("hidden states between two layers", 2 * BF16 * run.tokens * model.hidden)
    disk = (artifact, between) if run.tokens else (artifact,)
    if device == "cpu":
        return Needs(stage, "compress", host_peak(model, run), None, 0, disk)
    peak = device_peak(model, run)
    on_device = Peak(peak.when, (*peak.parts, _driver()))
    return Needs(stage, "compress", host_peak(model, run), on_device, 1, disk)


def _convert(checkpoint: Checkpoint, recipe: Recipe, stage: str) -> Needs:
    """Weights are repacked a block at a time, and written beside those that they are made from."""
    artifact = Part("the repacked checkpoint", promised_bytes(checkpoint, recipe))
    return Needs(stage, "convert", _core("repacking"), None, 0, (artifact,))


def _driver() -> Part:
    return Part("the driver's context", DRIVER_BYTES, spare=True)


WIDTHS = {("autoawq", "cpu"): FP32}
"""Bytes of a parameter and of a hidden state where they are not BF16; see workers/autoawq.py."""


def _whole(checkpoint: Checkpoint, model: Decoder, run: Run, width: int) -> Peak:
    """llm-compressor's oneshot, and likewise: the whole model, and every sample's hidden states.

    A Hessian for each linear of a layer with GPTQ (on a CPU). AWQ keeps the inputs of what it
    searches, too: about four times the hidden states. Both rough; see bench/engine.md.
    """
    states = width * run.tokens * model.hidden
    hessians = FP32 * sum(linear.columns**2 for linear in model.linears) if run.gptq else 0
    kept = [
        Part("the checkpoint", width * checkpoint.parameters),
        Part("hidden states", states * (5 if "awq" in run.method else 1), spare=True),
        Part("interpreter and libraries", IMPORTS_BYTES[run.device], spare=True),
    ]
    if run.device == "cpu":
        kept.append(Part("a Hessian for each linear", hessians, spare=True))
    return Peak("the whole model", tuple(kept))


def _whole_on_device(model: Decoder, run: Run) -> Peak:
    """One layer at a time is moved to the GPU, with a Hessian for each of its linears."""
    hessians = FP32 * sum(linear.columns**2 for linear in model.linears) if run.gptq else 0
    widest = max((linear.columns for linear in model.linears), default=0)
    return Peak(
        "a layer",
        (
            Part("the layer", BF16 * model.layer_elements),
            Part("a Hessian for each linear", hessians),
            Part("its inverse and factor", 3 * FP32 * widest**2 if run.gptq else 0, spare=True),
            _driver(),
        ),
    )


def served_bytes(checkpoint: Checkpoint, recipe: Recipe, stage: str, unpacks: bool) -> int:
    """Bytes of the weights that a measurement serves: vLLM is asked for BF16."""
    if stage == "measure-candidate" and not unpacks:
        return promised_bytes(checkpoint, recipe)
    return BF16 * checkpoint.parameters


def cache_value_bytes(recipe: Recipe, stage: str) -> int:
    """Of a number in the KV cache: FP8 where the candidate brings scales for it."""
    quantized = stage == "measure-candidate" and recipe.quantize.kv_cache is not None
    return FP8_BYTES if quantized else BF16


def context_length(checkpoint: Checkpoint, recipe: Recipe) -> int | None:
    """Tokens that one request may have: the server refuses to start without room for them."""
    return recipe.serve.max_model_len or checkpoint.dimension("max_position_embeddings")


def _measure(
    checkpoint: Checkpoint, recipe: Recipe, stage: str, device: str, unpacks: bool
) -> Needs:
    weights = served_bytes(checkpoint, recipe, stage, unpacks)
    disk = [RECORDS]
    if stage == "measure-candidate" and unpacks:
        disk.append(Part("the weights unpacked to BF16", weights))
    process = Part("server and lm-eval", SERVER_BYTES[device], spare=True)
    if device == "cpu":
        cache = Part("the KV cache", recipe.serve.kv_cache_gib << 30, spare=True)
        host = Peak("serving", (Part("the weights", weights), cache, process))
        return Needs(stage, "measure", host, None, 0, tuple(disk))
    parallel = recipe.serve.tensor_parallel_size
    parts = [Part("the weights", -(-weights // parallel))]
    shape, tokens = attention(checkpoint.text_config), context_length(checkpoint, recipe)
    if isinstance(shape, dict) and tokens is not None:
        each = share_bytes_per_token(shape, parallel, cache_value_bytes(recipe, stage))
        what = f"the KV cache of one request of {tokens:,} tokens"
        # Layers with a window keep fewer tokens: an upper bound.
        windowed = bool(checkpoint.text_config.get("sliding_window"))
        parts.append(Part(what, each * tokens, spare=windowed))
    parts.append(Part("activations and graphs", ALLOWANCE_BYTES, spare=True))
    on_device = Peak("serving", tuple(parts))
    return Needs(stage, "measure", Peak("", (process,)), on_device, parallel, tuple(disk))
