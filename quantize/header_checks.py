"""Do the safetensors headers hold what config.json promises? Names, shapes and dtypes alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from quantize.architectures import COMPUTED, Promises, promised_tensors
from quantize.checkpoint import Checkpoint
from quantize.findings import Finding
from quantize.printable import shortened
from quantize.tensors import TensorInfo

NUMBERED = re.compile(r"^model\.layers\.(\d{1,9})\.")
FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
HALVES = frozenset({"BF16", "F16"})


def promises_of(checkpoint: Checkpoint) -> Promises | None:
    """What the table of architectures expects here; None where it does not know."""
    fused = any(FUSED.search(name) for name in checkpoint.tensors)
    return promised_tensors(checkpoint.architecture, checkpoint.text_config, fused_experts=fused)


def check_headers(checkpoint: Checkpoint, promises: Promises) -> list[Finding]:
    """Tensors that are missing, that nothing reads, or that have another shape."""
    there = {name for name in checkpoint.tensors if not COMPUTED.search(name)}
    missing = [n for n, promise in promises.items() if promise.required and n not in there]
    unknown = sorted(there - promises.keys())
    found = _layer_findings(checkpoint, missing, unknown)
    if found:  # the single tensors would say the same again
        whole = _numbers(promises) ^ _numbers(checkpoint.tensors)
        missing = [name for name in missing if _number(name) not in whole]
        unknown = [name for name in unknown if _number(name) not in whole]
    if missing:
        found.append(_missing(checkpoint, missing, promises))
    if unknown:
        found.append(_unknown(checkpoint, unknown))
    return found + _shape_findings(checkpoint, promises)


def notes_on_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Mixtures that a sound checkpoint hardly has: BF16 weights beside FP16 ones.

    Norms, routers and heads in FP32 beside weights of 16 bits are usual.
    """
    counts = Counter(info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1)
    if not counts.keys() >= HALVES:
        return []
    said = " and ".join(f"{counts[dtype]} in {dtype}" for dtype in sorted(HALVES))
    return [
        f"the checkpoint mixes two 16-bit formats: of its matrices {said}; both are read as BF16, "
        "but one that was put together from two is worth a look"
    ]


def _number(name: str) -> int | None:
    """Of the layer that a tensor belongs to, if any."""
    found = NUMBERED.match(name)
    return None if found is None else int(found[1])


def _numbers(names: Iterable[str]) -> set[int]:
    return {number for name in names if (number := _number(name)) is not None}


def _layer_findings(
    checkpoint: Checkpoint, missing: Sequence[str], unknown: Sequence[str]
) -> list[Finding]:
    """More or fewer layers than the config says."""
    layers = _numbers(checkpoint.tensors)
    wanted = checkpoint.dimension("num_hidden_layers") or 0
    beyond = max(layers, default=-1) >= wanted
    absent = wanted - len(layers)  # counted: a config may state any number
    if not (beyond or absent) or not (missing or unknown):
        return []
    if beyond:
        what = f"layers up to {max(layers)}"
    else:
        first = next(number for number in itertools.count() if number not in layers)
        what = f"no tensor of layer {first}"
        what += f" and {absent - 1} more layers" if absent > 1 else ""
    return [
        Finding(
            f"the checkpoint has {what}, and config.json says num_hidden_layers: {wanted}",
            "take config.json and the weights from the same commit",
        )
    ]


def _missing(checkpoint: Checkpoint, names: Sequence[str], promises: Promises) -> Finding:
    first = names[0]
    hint = "download or save the checkpoint again, whole"
    if first == "lm_head.weight":
        hint += "; or set tie_word_embeddings: true in config.json if the head is the embedding"
    elif first.endswith(".bias"):
        hint += "; or correct the key of config.json that turns biases on"
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return Finding(
        f"{_listed(names)} {verb} not there, and {checkpoint.architecture} needs {them} "
        f"({_stated(checkpoint, promises[first].keys)}): transformers would fill {them} at random",
        hint,
    )


def _unknown(checkpoint: Checkpoint, names: Sequence[str]) -> Finding:
    verb = "has" if len(names) == 1 else "have"
    return Finding(
        f"{_listed(names)} {verb} no place in {checkpoint.architecture} with this config.json: "
        "a loader would leave out what was trained",
        "take config.json and the weights from the same commit; remove what is no part of the "
        "model (optimizer states, buffers)",
    )


def _shape_findings(checkpoint: Checkpoint, promises: Promises) -> list[Finding]:
    """One finding for each shape that config.json promises and the header does not have."""
    wrong: dict[tuple[str, ...], list[TensorInfo]] = {}
    for name, promise in promises.items():
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != promise.shape:
            wrong.setdefault(promise.keys, []).append(info)
    return [
        Finding(
            f"{shortened(infos[0].name)} has the shape {list(infos[0].shape)}, not "
            f"{list(promises[infos[0].name].shape)}"
            + (f" (and {len(infos) - 1} more tensors)" if infos[1:] else "")
            + f", as config.json says ({_stated(checkpoint, keys)})",
            "take config.json and the weights from the same commit, or correct these keys",
        )
        for keys, infos in wrong.items()
    ]


def _stated(checkpoint: Checkpoint, keys: Sequence[str]) -> str:
    """The keys with their values, as far as config.json states them."""
    said = [
        f"{k}: {shortened(str(checkpoint.text_config[k]))}"
        for k in keys
        if k in checkpoint.text_config
    ]
    return ", ".join(said) or ", ".join(keys)


def _listed(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{noun} {', '.join(map(shortened, names[:limit]))}{more}"
