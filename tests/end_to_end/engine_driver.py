"""Both engines on one architecture, in one process: what test_engine_parity.py asserts on, as JSON.

Runs in the llmcompressor environment, from the repository's root:
`python -m tests.end_to_end.engine_driver ARCHITECTURE FOLDER OUTPUT.json [CASE ...]`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "1")

# Sets the allocator before torch is imported, as in a process of its own.
from quantize.workers import stream  # isort: skip
import torch
from safetensors.torch import load_file

from quantize.protocol import Events, Request
from quantize.workers import oneshot
from tests.end_to_end import engine_kl, engine_models

CALIBRATION = (16, 256)  # sequences, tokens
HELD_OUT = (64, 256)
FEW = 8
"""Held-out sequences that are enough to see that two equal checkpoints run and are equal."""
ENGINES = {"oneshot": oneshot.run, "stream": stream.run}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One request, without paths."""

    method: str
    scheme: str
    group_size: int | str | None = None
    exact: bool = False
    """The engines must write the same bytes; otherwise their KL divergences are compared."""
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[dict[str, Any], ...] = ()
    kv_cache: str | None = None
    activation_order: str = "static"
    sets: int = 1
    """Calibration sets over which KL divergences are averaged. With GPTQ the engines' ratio differs
    by 2 % (standard deviation) from one set to the next, in either direction: thousands of
    roundings hang on the last bits of sums. With AWQ alone it is less than 1 %.
    """


DOWN_AT_8 = {"modules": ["re:.*down_proj$"], "scheme": "W8A16", "group_size": 128}
# Everywhere:
COMMON = {
    "fp8": Case("fp8", "FP8_DYNAMIC", exact=True),
    "rtn": Case("rtn", "W4A16_ASYM", 128, exact=True),
    "gptq": Case("gptq", "W4A16", 128, sets=3),
    "awq": Case("awq", "W4A16_ASYM", 128),
    "awq+gptq": Case("awq+gptq", "W4A16_ASYM", 128, sets=2),
}
# The formats and options do not depend on the architecture, so one has them all:
LLAMA = {
    "rtn-g32": Case("rtn", "W4A16", 32, exact=True),
    "rtn-channel": Case("rtn", "W4A16", "channel", exact=True),
    "rtn-asym-channel": Case("rtn", "W4A16_ASYM", "channel", exact=True),
    "rtn-w8a16": Case("rtn", "W8A16", 128, exact=True),
    "rtn-w8a16-channel": Case("rtn", "W8A16", "channel", exact=True),
    "rtn-w8a8": Case("rtn", "W8A8", exact=True),
    "rtn-nvfp4": Case("rtn", "NVFP4A16", exact=True),
    "rtn-mxfp4": Case("rtn", "MXFP4A16", exact=True),
    "fp8-block": Case("fp8", "FP8_BLOCK", exact=True),
    "rtn-ignore": Case(
        "rtn",
        "W4A16",
        128,
        exact=True,
        ignore=("lm_head", "re:.*k_proj$", "model.layers.0.mlp.down_proj"),
    ),
    "rtn-mixed": Case("rtn", "W4A16", 128, exact=True, overrides=(DOWN_AT_8,)),
    "gptq-mixed": Case("gptq", "W4A16", 128, overrides=(DOWN_AT_8,)),
    "gptq-no-order": Case("gptq", "W4A16", 128, activation_order="none"),
    "gptq-weight-order": Case("gptq", "W4A16", 128, activation_order="weight"),
    "gptq-asym-g32": Case("gptq", "W4A16_ASYM", 32),
    "gptq-channel": Case("gptq", "W4A16", "channel"),
    "gptq-nvfp4": Case("gptq", "NVFP4A16"),
    "gptq-mxfp4": Case("gptq", "MXFP4A16"),
    "int8": Case("int8", "W8A8"),
    "fp8-static": Case("fp8", "FP8"),
    "fp8-kv-cache": Case("fp8", "FP8_DYNAMIC", kv_cache="fp8"),
}


def cases(architecture: str) -> dict[str, Case]:
    """The cases of an architecture by name."""
    return COMMON | LLAMA if architecture == "llama" else COMMON


def main() -> None:
    architecture, folder, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    named = cases(architecture)
    chosen = {name: named[name] for name in sys.argv[4:] or named}
    model = folder / "model"
    if not model.exists():
        engine_models.build(architecture, model)
    held_out = engine_models.sequences("held_out", *HELD_OUT)
    against = engine_kl.baseline(model, held_out)
    found: dict[str, Any] = {"baseline": asdict(against.measured), "cases": {}}
    for name, case in chosen.items():
        found["cases"][name] = compared(name, case, folder, against)
        output.write_text(json.dumps(found))
    if architecture == "qwen3_moe":
        found["unvisited"] = unvisited(folder)
        output.write_text(json.dumps(found))


def compared(name: str, case: Case, folder: Path, against: engine_kl.Baseline) -> dict[str, Any]:
    """Both engines' checkpoints of one case, measured, with their differences."""
    found: dict[str, Any] = {"exact": case.exact}
    held_out = against.first(FEW) if case.exact else against
    for engine in ENGINES:
        measured = []
        for number in range(case.sets):
            output = folder / f"{name}-{number}" / engine
            result = quantized(engine, case, folder, output, engine_models.SEED + number)
            measured.append(asdict(engine_kl.measure(output / "model", held_out)))
        kl = sum(one["kl"] for one in measured) / len(measured)
        found[engine] = {"result": result, "kl": kl, "measured": measured}
    ours, theirs = (folder / f"{name}-0" / engine / "model" for engine in ENGINES)
    found["differences"] = tensor_differences(ours, theirs, folder / "model", values=case.exact)
    found["config_differences"] = config_differences(ours, theirs)
    found["ranges"] = range_differences(ours, theirs)
    return found


def quantized(
    engine: str, case: Case, folder: Path, output: Path, seed: int = engine_models.SEED
) -> dict[str, Any]:
    """Run a worker on `folder/model`; its checkpoint is in `output/model`."""
    work = output / "work"
    work.mkdir(parents=True)
    tokens = output / "tokens.npz"
    engine_models.write_tokens(tokens, *CALIBRATION, seed)
    body = {
        "model": str(folder / "model"),
        "output": str(output / "model"),
        "tokens": str(tokens) if calibrated(case) else None,
        "method": case.method,
        "scheme": case.scheme,
        "group_size": case.group_size,
        "ignore": list(case.ignore),
        "overrides": list(case.overrides),
        "kv_cache": case.kv_cache,
        "dampening": 0.01,
        "activation_order": case.activation_order,
        "copy": [],
    }
    (output / "model").mkdir()
    events = output / "events.jsonl"
    return ENGINES[engine](Request(engine, body, str(work), str(events)), Events(events))


def calibrated(case: Case) -> bool:
    """Whether the request needs token ids."""
    data_free = case.method in ("rtn", "fp8") and case.scheme != "FP8"
    return not data_free or case.kv_cache is not None


def tensors(folder: Path) -> Tensors:
    """Everything in a checkpoint folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def tensor_differences(first: Path, second: Path, source: Path, values: bool) -> list[str]:
    """Names, types and shapes that differ, and where `values` bytes; sentences.

    A norm may be the source's in the streaming engine's checkpoint (`second`) and not in the other:
    `oneshot` adds one to Gemma's norms in BF16 and takes it off again, which loses bits.
    """
    ours, theirs, before = tensors(first), tensors(second), tensors(source)
    found = [f"{name}: only in {first.parent.name}" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"{n}: only in {second.parent.name}" for n in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if "norm" in name and name in before and torch.equal(b, before[name]):
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}")
        elif values and not torch.equal(_bytes(a), _bytes(b)):
            count = int((_bytes(a) != _bytes(b)).sum())
            found.append(f"{name}: {count} of {_bytes(a).numel()} bytes differ")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def range_differences(first: Path, second: Path) -> float:
    """Largest relative difference of any static scale of activations, keys or values; 0 if none."""
    ours, theirs = tensors(first), tensors(second)
    names = [n for n in ours if n.endswith(("input_scale", "k_scale", "v_scale")) and n in theirs]
    return max(
        (float(((ours[n].float() / theirs[n].float()) - 1).abs().max()) for n in names), default=0.0
    )


def config_differences(first: Path, second: Path) -> list[str]:
    """Where the two quantization configs differ, but for the order of lists."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    ours, theirs = (flat(config["quantization_config"]) for config in configs)
    keys = sorted(ours.keys() | theirs.keys())
    return [
        f"{key}: {ours.get(key, 'absent')}, {theirs.get(key, 'absent')}"
        for key in keys
        if ours.get(key, "absent") != theirs.get(key, "absent")
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; lists sorted."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in flat(value[key], f"{path}.{key}").items()}
    return {path: sorted(value, key=str) if isinstance(value, list) else value}


def unvisited(folder: Path) -> dict[str, Any]:
    """A mixture in which no token goes to one expert of one layer: GPTQ against round-to-nearest.

    Routers have no bias. The expert's row becomes the direction in which all calibration tokens
    have about the same negative product, times a large number.
    """
    layer, expert = 1, 3
    made = folder / "lonely"
    model = engine_kl.load_stacked(folder / "model")
    gate = model.model.layers[layer].mlp.gate
    _, inputs = _routed(model)
    wanted = -50 * torch.ones(len(inputs[layer]), 1)
    with torch.no_grad():
        gate.weight[expert] = torch.linalg.lstsq(inputs[layer], wanted).solution[:, 0]
    chosen, _ = _routed(model)
    engine_models.save(model, made / "model")
    result = quantized("stream", Case("gptq", "W4A16", 128), made, made / "gptq")
    quantized("stream", Case("rtn", "W4A16", 128), made, made / "rtn")
    source, gptq, rtn = (tensors(made / name) for name in ("model", "gptq/model", "rtn/model"))
    engine_kl.load_stacked(made / "gptq" / "model")
    lonely = [name for name, count in chosen.items() if count == 0]
    experts = {name.rpartition(".")[0] for name in result["unvisited"]}
    packed = [name for name in rtn if ".experts." in name and name.endswith("weight_packed")]
    return {
        "expert": f"model.layers.{layer}.mlp.experts.{expert}",
        "never_chosen": lonely,
        "named": result["unvisited"],
        "named_experts": sorted(experts),
        "as_nearest": sorted(
            {n.rpartition(".")[0] for n in packed if torch.equal(gptq[n], rtn[n])}
        ),
        "routers_untouched": all(
            torch.equal(source[n], gptq[n]) for n in source if n.endswith("mlp.gate.weight")
        ),
    }


@torch.no_grad()
def _routed(model: Any) -> tuple[dict[str, int], list[torch.Tensor]]:
    """How often each expert is chosen on the calibration set, and each router's inputs, float32."""
    counts: dict[str, int] = {}
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = []
    for number, layer in enumerate(model.model.layers):

        def look(router: Any, args: Any, output: Any, number: int = number) -> None:
            inputs[number].append(args[0].float())
            for expert, count in enumerate(output[2].flatten().bincount(minlength=8).tolist()):
                name = f"model.layers.{number}.mlp.experts.{expert}"
                counts[name] = counts.get(name, 0) + count

        hooks.append(layer.mlp.gate.register_forward_hook(look))
    for row in engine_models.sequences("calibration", *CALIBRATION):
        model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts, [torch.cat(seen) for seen in inputs]


if __name__ == "__main__":
    main()
