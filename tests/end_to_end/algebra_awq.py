"""AWQ's search and the sensitivity record, against the linears' real outputs in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from quantize.engine import awq, clip, sensitivity
from quantize.engine.inputs import Inputs, Watch
from quantize.engine.layer import Layer
from quantize.engine.probe import Probe
from tests.end_to_end.algebra_data import (
    activations,
    output_error,
    packed,
    preset,
    relative,
    stored,
    weights,
)

WIDTH, INNER, TOKENS = 128, 256, 768
LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
NORMS = {
    "Llama": ("input_layernorm", "post_attention_layernorm"),
    "Gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
}
BF16_STEP = 2.0**-8


def decoder(kind: str, seed: int) -> torch.nn.Module:
    """A layer with weights of a trained one's kind, and norms with a few large channels."""
    torch.manual_seed(seed)
    config_class, layer_class = {
        "Llama": (LlamaConfig, LlamaDecoderLayer),
        "Gemma2": (Gemma2Config, Gemma2DecoderLayer),
    }[kind]
    config = config_class(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        attn_implementation="eager",
    )
    layer: torch.nn.Module = layer_class(config, 0).to(torch.bfloat16).eval()
    for number, name in enumerate(LINEARS):
        module = layer.get_submodule(name)
        module.weight.copy_(weights(*module.weight.shape, seed + number) * 3)
    random = torch.Generator().manual_seed(seed)
    for name in NORMS[kind]:
        scale = torch.randn(WIDTH, generator=random).mul(0.4).exp()
        scale[torch.randperm(WIDTH, generator=random)[:4]] *= 25
        layer.get_submodule(name).weight.copy_(scale - (1.0 if kind == "Gemma2" else 0.0))
    return layer


def arguments(kind: str, hidden: torch.Tensor) -> dict[str, Any]:
    """What the layer is called with beside hidden states (batch, tokens, width)."""
    rotary = {
        "Llama": (LlamaRotaryEmbedding, LlamaConfig),
        "Gemma2": (Gemma2RotaryEmbedding, Gemma2Config),
    }[kind]
    config = rotary[1](hidden_size=WIDTH, num_attention_heads=4, head_dim=WIDTH // 4)
    positions = torch.arange(hidden.shape[1])[None]
    return {"position_embeddings": rotary[0](config)(hidden, positions)}


def outputs(kind: str, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The layer's output (batch, tokens, width) in the layer's dtype."""
    return first(layer(hidden, **arguments(kind, hidden)))


def first(output: Any) -> torch.Tensor:
    """A module's main output."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@dataclass
class Watched:
    """A layer, its inputs, and what the engine's watch made of them."""

    kind: str
    layer: Layer
    watch: Watch
    hidden: torch.Tensor
    inputs: dict[str, torch.Tensor]  # (tokens, columns) BF16 by linear
    mappings: list[awq.Mapping]

    @classmethod
    def of(cls, kind: str, scheme: QuantizationScheme, seed: int) -> Watched:
        module = decoder(kind, seed)
        random = torch.Generator().manual_seed(seed + 100)
        hidden = torch.randn(TOKENS // 64, 64, WIDTH, generator=random).to(torch.bfloat16)
        inputs: dict[str, torch.Tensor] = {}
        layer = Layer(0, "model.layers.0.", module, dict.fromkeys(LINEARS, scheme))
        watch = Watch(module, LINEARS, LINEARS)
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))
            )
            for name in LINEARS
        ]
        with watch.hooked(stop_early=False):
            outputs(kind, module, hidden)
            watch.end_of_pass()
        for hook in hooks:
            hook.remove()
        for record in watch.inputs.values():
            record.complete()
        known = AWQ_MAPPING_REGISTRY[f"{kind}ForCausalLM"]
        return cls(kind, layer, watch, hidden, inputs, awq.mappings(module, known, layer.schemes))

    def readers(self, mapping: awq.Mapping) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name in mapping.balance:
            yield self.layer.module.get_submodule(name).weight, self.inputs[name]

    def direct(self, mapping: awq.Mapping, scales: torch.Tensor) -> float:
        """Squared error of the outputs per token, by packing and unpacking every linear."""
        scheme = next(iter(self.layer.schemes.values()))
        total = 0.0
        for weight, x in self.readers(mapping):
            rounded = stored((weight * scales).to(weight.dtype), scheme)
            error = (rounded / scales).to(weight.dtype).double() - weight.double()
            total += output_error(error, x) / len(x)
        return total

    def change(
        self, mapping: awq.Mapping, scales: torch.Tensor, parent: str, hidden: torch.Tensor
    ) -> float:
        """Squared change of a module's output by rounding the mapping's linears at the scales."""
        scheme = next(iter(self.layer.schemes.values()))
        rounded = copy.deepcopy(self.layer.module)
        for name in mapping.balance:
            weight = rounded.get_submodule(name).weight
            weight.copy_(stored((weight * scales).to(weight.dtype), scheme) / scales)
        taken: list[torch.Tensor] = []
        for module in (self.layer.module, rounded):
            hook = module.get_submodule(parent).register_forward_hook(
                lambda _, args, output: taken.append(first(output))
            )
            outputs(self.kind, module, hidden)
            hook.remove()
        return float((taken[0].double() - taken[1].double()).square().sum())

    def candidates(self, mapping: awq.Mapping) -> Iterator[tuple[float, torch.Tensor]]:
        """The paper's grid as llm-compressor has it, computed from the definition in float64.

        s = mean|x|^r / mean|w|^(1-r), with each group of weights normalised by its largest.
        """
        group = next(iter(self.layer.schemes.values())).weights.group_size
        x = self.inputs[mapping.balance[0]].double().abs().mean(0)
        rows = torch.cat([weight for weight, _ in self.readers(mapping)]).double().abs()
        parts = rows.view(len(rows), -1, group or rows.shape[1])
        w = (parts / (parts.amax(-1, keepdim=True) + 1e-6)).reshape(rows.shape).mean(0)
        yield 0.0, torch.ones(len(x))
        for step in range(19):
            ratio = step / 18
            scales = (x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
            yield ratio, (scales / (scales.max() * scales.min()).sqrt()).float()


def search(kind: str, scheme: str, group_size: int | str | None) -> dict[str, Any]:
    """Losses are those of real outputs, and the scales those of an exhaustive exact search.

    Scales are compared at the same ratio only. Of the loss, that of the scales as they were found:
    those of the exact search at this ratio round differently, which is up to a percent of it.
    """
    figures: dict[str, Any] = {}
    same = total = 0
    ratios = sorted({ratio for ratio, _ in awq.GRID})
    step = ratios[1] - ratios[0]
    for seed in (10, 20):
        made = Watched.of(kind, preset(scheme, group_size), seed)
        assert len(made.mappings) == 4, made.mappings
        for mapping in made.mappings:
            found = awq.search(made.layer.module, mapping, made.watch, None)
            assert found is not None
            exact = {
                (ratio, number > 0): (made.direct(mapping, scales), scales)
                for number, (ratio, scales) in enumerate(made.candidates(mapping))
            }
            (ratio, weighted), (best, _) = min(exact.items(), key=lambda item: item[1][0])
            unscaled, _ = exact[0.0, False]
            _, scales = exact[found.ratio, found.ratio > 0 or weighted]
            chosen = made.direct(mapping, found.scales)
            figures[f"{mapping.smooth}, seed {seed}"] = one = {
                "loss": relative(found.loss, chosen),
                "loss before": relative(found.loss_before, unscaled),
                "scales": float((found.scales / scales - 1).abs().max()),
                "ratio": found.ratio,
                "best ratio": ratio,
                "chosen / best": chosen / best,
                "best / unscaled": best / unscaled,
            }
            assert one["loss"] < 1e-3 and one["loss before"] < 1e-3, figures
            assert one["scales"] < 1e-3 and one["chosen / best"] < 1.01, figures
            assert abs(found.ratio - ratio) < 1.01 * step, figures  # the next one at most
            same += found.ratio == ratio
            total += 1
    # Which of two neighbours is lower by half a percent hangs on the processor's roundings.
    assert same >= total - 2, figures
    assert min(one["best / unscaled"] for one in figures.values()) < 0.5, figures
    return figures


def sampled() -> dict[str, Any]:
    """Where a weight has more rows than are looked at, the loss is an estimate of the whole one."""
    figures: dict[str, Any] = {}
    rows, columns = 2048, 512
    x = activations(1200, columns, 5)
    layer = torch.nn.ModuleDict(
        {
            "norm": torch.nn.RMSNorm(columns, dtype=torch.bfloat16),
            "up": torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16),
        }
    )
    layer["up"].weight = torch.nn.Parameter(weights(rows, columns, 6), requires_grad=False)
    scheme = preset("W4A16_ASYM", 128)
    Layer(0, "", layer, {"up": scheme})
    watch = Watch(layer, ["up"], ["up"])
    with watch.hooked(stop_early=False):
        layer["up"](x)
        watch.end_of_pass()
    watch.inputs["up"].complete()
    mapping = awq.Mapping("norm", ("up",))
    made = Watched("", Layer(0, "", layer, {"up": scheme}), watch, x, {"up": x}, [mapping])
    found = awq.search(layer, mapping, watch, None)
    assert found is not None
    exact = {ratio: made.direct(mapping, scales) for ratio, scales in made.candidates(mapping)}
    figures = {
        "loss": relative(found.loss, made.direct(mapping, found.scales)),
        "ratio": found.ratio,
        "best ratio": min(exact, key=lambda ratio: exact[ratio]),
        "chosen / best": exact[found.ratio] / min(exact.values()),
    }
    assert 0 < figures["loss"] < 0.1 and figures["chosen / best"] < 1.02, figures
    return figures


def probed() -> dict[str, Any]:
    """Of the best candidates, the one is taken that changes attention's or the MLP's output least.

    The candidates are the exact search's, the change that of packed weights, in BF16 as the model
    computes it; nothing is left changed.
    """
    figures: dict[str, Any] = {}
    other = 0
    for seed in (10, 20, 30):
        made = Watched.of("Llama", preset("W4A16", 64), seed)
        module, tokens = made.layer.module, made.hidden[:2]
        parents = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
        probe = Probe(module, tokens, arguments("Llama", tokens), parents.values())
        before = {name: weight.clone() for name, weight in module.named_parameters()}
        for mapping in made.mappings:
            found = awq.search(module, mapping, made.watch, probe)
            alone = awq.search(module, mapping, made.watch, None)
            assert found is not None and alone is not None
            if mapping.smooth not in parents:
                assert torch.equal(found.scales, alone.scales)
                continue
            exact = [(made.direct(mapping, s), r, s) for r, s in made.candidates(mapping)]
            finalists = sorted(exact, key=lambda point: point[0])[: awq.FINALISTS]
            changes = {
                ratio: made.change(mapping, scales, parents[mapping.smooth], tokens)
                for _, ratio, scales in finalists
            }
            best = min(changes, key=lambda ratio: changes[ratio])
            figures[f"{mapping.smooth}, seed {seed}"] = {
                "ratio": found.ratio,
                "best ratio": best,
                "without probe": alone.ratio,
                "chosen / best": changes[found.ratio] / changes[best],
            }
            assert changes[found.ratio] <= 1.01 * changes[best], figures
            other += found.ratio != alone.ratio
        for name, weight in module.named_parameters():  # scales have no values yet
            assert not name.endswith(".weight") or torch.equal(weight, before[name])
    assert other, "the probe never made a difference"
    return figures


def unchanged(kind: str) -> dict[str, Any]:
    """Scaling changes nothing: exactly for weights that are not rounded, nearly for BF16 ones."""
    figures = {}
    made = Watched.of(kind, preset("W4A16_ASYM", 32), 30)
    module = made.layer.module
    hidden = made.hidden.double()
    exact = outputs(kind, copy.deepcopy(module).double(), hidden)
    for mapping in made.mappings:
        found = awq.search(module, mapping, made.watch, None)
        assert found is not None
        unrounded, rounded = copy.deepcopy(module).double(), copy.deepcopy(module)
        awq.apply(unrounded, found, copy.deepcopy(made.watch))
        awq.apply(rounded, found, made.watch)
        figures[mapping.smooth] = one = {
            "unrounded": _distance(outputs(kind, unrounded, hidden), exact, hidden),
            "BF16": _distance(outputs(kind, rounded.double(), hidden), exact, hidden),
            "spread of scales": float(found.scales.max() / found.scales.min()),
        }
        assert one["spread of scales"] > 1.5, figures
        assert one["unrounded"] < 1e-6, figures  # quotients are float32
        assert one["BF16"] < 4 * BF16_STEP, figures
        # H of the scaled inputs is the one that a new pass over the data would give.
        record = made.watch.of(mapping.balance[0])
        x = made.inputs[mapping.balance[0]].double() / found.scales.double()
        assert record is not None
        assert (record.gram - x.T @ x).norm() / (x.T @ x).norm() < 1e-5
        assert torch.allclose(record.absolute.double(), x.abs().sum(0), rtol=1e-4)
    return figures


def _distance(output: torch.Tensor, exact: torch.Tensor, hidden: torch.Tensor) -> float:
    """Relative to what the layer adds to its input."""
    return float((output - exact).norm() / (exact - hidden).norm())


def sensitivities() -> dict[str, Any]:
    """error and bytes of every candidate: those of packed tensors on the real inputs."""
    figures: dict[str, Any] = {}
    for rows, columns in ((96, 256), (64, 160), (704, 128)):
        x = activations(512, columns, rows)
        module = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        module.weight = torch.nn.Parameter(weights(rows, columns, rows), requires_grad=False)
        inputs = Inputs.empty(columns, torch.device("cpu"))
        inputs.add(x, 1)
        inputs.complete()
        made = sensitivity.record("model.layers.3.mlp.up_proj", 3, module, inputs)
        assert made is not None and made["unit"] == "model.layers.3.mlp.gate_up"
        fits = [size for size in (32, 128) if columns % size == 0]
        named = [(one["scheme"], one["group_size"]) for one in made["candidates"]]
        grouped = [(name, size) for name in ("W4A16", "W4A16_ASYM") for size in fits]
        wide = [("W8A16", 128)] * (128 in fits)
        assert sorted(named, key=str) == sorted(
            [*grouped, *wide, ("FP8_DYNAMIC", None), ("BF16", None)], key=str
        ), named
        assert made["shape"] == [rows, columns]
        whole = output_error(module.weight, x)
        for one in made["candidates"]:
            name = f"{rows}x{columns} {one['scheme']} {one['group_size']}"
            if one["scheme"] == "BF16":
                assert (one["error"], one["bytes"]) == (0.0, 2 * rows * columns)
                continue
            scheme = preset(one["scheme"], one["group_size"])
            _, total = packed(module.weight, scheme)
            error = stored(module.weight, scheme).double() - module.weight.double()
            figures[name] = found = relative(one["error"], output_error(error, x) / whole)
            assert one["bytes"] == total, (name, one["bytes"], total)
            # Some rows stand for all; their sizes differ here, so sums of samples do, too.
            assert found < (1e-3 if rows <= sensitivity.ROWS else 0.25), figures
    return figures


def clipped(scheme_name: str, group_size: int | str) -> dict[str, Any]:
    """Each group's range is the best of those tried, by packed weights on the tokens in float64."""
    rows, columns = 48, 256
    scheme = preset(scheme_name, group_size)
    size = columns if group_size == "channel" else int(group_size)
    x = activations(1024, columns, 7)
    weight = weights(rows, columns, 7)
    parts = weight.view(rows, -1, size)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    losses = []
    for share in clip.SHARES:
        tried = parts.clamp(low * share, high * share).view(rows, columns)
        error = (stored(tried, scheme).double() - weight.double()).view(parts.shape)
        by_group = x.double().view(len(x), -1, size)
        outputs = torch.einsum("tgs,rgs->trg", by_group, error)
        losses.append(outputs.square().sum(0) / len(x))
    best = torch.stack(losses).amin(0)
    inputs = Inputs.empty(columns, torch.device("cpu"))
    inputs.add(x, 1)
    inputs.complete()
    made = weight.clone()
    found = clip.clip(made, inputs, scheme.weights)
    error = (stored(made, scheme).double() - weight.double()).view(parts.shape)
    reached = torch.einsum("tgs,rgs->trg", x.double().view(len(x), -1, size), error)
    reached = reached.square().sum(0) / len(x)
    whole = output_error(stored(weight, scheme).double() - weight.double(), x) / len(x)
    figures = {
        "loss before": relative(found.loss_before, float(losses[0].sum())),
        "loss": relative(found.loss, float(best.sum())),
        "of the whole range": float(best.sum() / losses[0].sum()),
        "worst group": float((reached / best).max()),
        "output error": output_error(stored(made, scheme).double() - weight.double(), x)
        / len(x)
        / whole,
        "share": found.share,
    }
    assert figures["loss before"] < 1e-3 and figures["loss"] < 1e-3, figures
    # Two shares that come out alike may change places by the sums' rounding.
    assert figures["worst group"] < 1.01, figures
    assert figures["of the whole range"] < 0.9 and figures["output error"] < 0.95, figures
    assert 0.2 < found.share < 1, figures
    return figures


CHECKS = {
    "awq_clip_groups": lambda: clipped("W4A16_ASYM", 64),
    "awq_clip_symmetric": lambda: clipped("W4A16", 128),
    "awq_clip_channel": lambda: clipped("W4A16_ASYM", "channel"),
    "awq_search_w4a16_asym": lambda: search("Llama", "W4A16_ASYM", 32),
    "awq_search_w4a16": lambda: search("Llama", "W4A16", 64),
    "awq_search_channel": lambda: search("Llama", "W4A16", "channel"),
    "awq_search_gemma": lambda: search("Gemma2", "W4A16_ASYM", 64),
    "awq_search_sampled": sampled,
    "awq_probed": probed,
    "awq_unchanged_llama": lambda: unchanged("Llama"),
    "awq_unchanged_gemma": lambda: unchanged("Gemma2"),
    "sensitivity": sensitivities,
}
