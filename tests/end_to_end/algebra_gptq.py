"""The engine's GPTQ against llm-compressor's own, on the same weight, H, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

from quantize.engine import gptq
from tests.end_to_end.algebra_data import activations, preset, weights

ROWS, COLUMNS = 160, 512
DAMPENING = 0.01

# Name → scheme, group size, least share of equal values, largest distance of tr(E H ET).
# One value that falls on the other side of a tie shifts what is left of its row, so one different
# sum order costs more than one value. Channel scales leave most room for that.
SCHEMES: dict[str, tuple[str, int | str | None]] = {
    "w4a16_g128": ("W4A16", 128),
    "w4a16_asym_g32": ("W4A16_ASYM", 32),
    "w4a16_channel": ("W4A16", "channel"),
    "w8a16_g128": ("W8A16", 128),
    "w8a8": ("W8A8", None),
    "fp8_channel": ("FP8_DYNAMIC", None),
    "fp8_block": ("FP8_BLOCK", None),
    "nvfp4": ("NVFP4A16", None),
    "mxfp4": ("MXFP4A16", None),
}


@dataclass(frozen=True)
class Case:
    """One weight with all that both implementations are given."""

    weight: torch.Tensor  # (rows, columns) BF16
    gram: torch.Tensor
    args: QuantizationArgs
    found: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weight: torch.Tensor, x: torch.Tensor, args: QuantizationArgs) -> Case:
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
        observer(weight)
        return cls(weight, x.float().T @ x.float(), args, observer.get_qparams())

    @property
    def grid(self) -> gptq.Grid:
        found = self.found
        return gptq.Grid.of(
            self.weight.shape, found["scale"], found["zero_point"], found["global_scale"], self.args
        )

    def ours(self, multiplied_in: torch.dtype = torch.float32) -> tuple[torch.Tensor, bool]:
        weight = self.weight.float()
        return gptq.quantize(weight, self.gram, self.grid, self.args, DAMPENING, multiplied_in)

    def on(self, device: str) -> Case:
        """The same on a device."""
        found = {
            name: value if value is None else value.to(device) for name, value in self.found.items()
        }
        return Case(self.weight.to(device), self.gram.to(device), self.args, found)

    def theirs(self, multiplied_in: torch.dtype = torch.float32) -> tuple[torch.Tensor, bool]:
        """Upstream rounds products to the scale's type."""
        scale, global_scale = self.found["scale"].to(multiplied_in), self.found["global_scale"]
        rounded, _, fell_back = quantize_weight(
            self.weight.float()[None].clone(),
            self.gram[None].clone(),
            scale[None],
            self.found["zero_point"][None],
            None if global_scale is None else global_scale.reshape(-1)[:1],
            self.args,
            percdamp=DAMPENING,
        )
        return rounded[0].float(), bool(fell_back[0])

    def nearest(self) -> torch.Tensor:
        found = self.found
        return fake_quantize(
            self.weight.float(),
            found["scale"].float(),
            found["zero_point"],
            self.args,
            global_scale=found["global_scale"],
        )

    def error(self, rounded: torch.Tensor) -> float:
        """tr(E H ET) in float64."""
        lost = rounded.double() - self.weight.double()
        return float(((lost @ self.gram.double()) * lost).sum())

    def equal(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """Share of values that are the same step of the grid.

        Both are steps times a float32 scale; between two steps lies more than 3 % of a value.
        """
        return float(((a - b).abs() <= 1e-4 * a.abs().clamp(min=1e-9)).double().mean())


def case(scheme: str, group_size: int | str | None, order: str | None, seed: int = 0) -> Case:
    args = preset(scheme, group_size).weights
    args.actorder = order
    # Fewer tokens than columns: without dampening H has no inverse.
    x = activations(COLUMNS - 100, COLUMNS, seed)
    return Case.of(weights(ROWS, COLUMNS, seed + 1), x, args)


def like_upstream(name: str) -> dict[str, Any]:
    scheme, group_size = SCHEMES[name]
    figures: dict[str, Any] = {}
    for order in (None, "static"):
        made = case(scheme, group_size, order)
        (ours, fell_back), (theirs, theirs_fell_back) = made.ours(), made.theirs()
        plain = made.error(made.nearest())
        figures[f"order {order}"] = found = {
            "equal": made.equal(ours, theirs),
            "error / upstream's": made.error(ours) / made.error(theirs),
            "error / nearest's": made.error(ours) / plain,
        }
        assert not fell_back and not theirs_fell_back
        assert found["equal"] >= 0.995, figures
        assert abs(found["error / upstream's"] - 1) <= 1e-3, figures
        assert found["error / nearest's"] < 1, figures
    return figures


def dead_columns() -> dict[str, Any]:
    """Columns that no input ever reaches become zero, and disturb none of the others."""
    figures = {}
    for order in (None, "static"):
        made = case("W4A16_ASYM", 128, order, seed=3)
        dead = torch.arange(COLUMNS) % 37 == 5
        made.gram[dead] = 0
        made.gram[:, dead] = 0
        (ours, _), (theirs, _) = made.ours(), made.theirs()
        figures[f"order {order}"] = made.equal(ours, theirs)
        assert torch.equal(ours[:, dead], torch.zeros_like(ours[:, dead]))
        assert figures[f"order {order}"] >= 0.995, figures
        assert abs(made.error(ours) / made.error(theirs) - 1) <= 1e-3
    return figures


def products_in_bf16() -> dict[str, Any]:
    """8-bit integers times BF16 scales as kernels multiply them: columns behind make up for it."""
    figures = {}
    for order in (None, "static"):
        made = case("W8A16", 128, order)
        (ours, _), (theirs, _) = made.ours(torch.bfloat16), made.theirs(torch.bfloat16)
        exact, _ = made.ours()
        figures[f"order {order}"] = found = {
            "equal": made.equal(ours, theirs),
            "error / upstream's": made.error(ours) / made.error(theirs),
            "error / float32's": made.error(ours) / made.error(exact.bfloat16().float()),
        }
        assert torch.equal(ours, ours.bfloat16().float())
        assert found["equal"] >= 0.98 and abs(found["error / upstream's"] - 1) <= 1e-3, figures
        assert found["error / float32's"] < 0.97, figures
    return figures


def stacked() -> dict[str, Any]:
    """Several weights on one H give what each gives alone."""
    args = preset("W4A16_ASYM", 32).weights
    args.actorder = "static"
    x = activations(400, 256, 5)
    cases = [Case.of(weights(rows, 256, rows), x, args) for rows in (128, 32, 48)]
    together, _ = gptq.quantize(
        torch.cat([made.weight.float() for made in cases]),
        cases[0].gram,
        gptq.stack([made.grid for made in cases]),
        args,
        DAMPENING,
    )
    parts = together.split([len(made.weight) for made in cases])
    figures = {
        f"{len(made.weight)} rows": made.equal(part, made.ours()[0])
        for made, part in zip(cases, parts, strict=True)
    }
    assert min(figures.values()) >= 0.995, figures
    return figures


def indefinite() -> dict[str, Any]:
    """An H without Cholesky factor: rounded to nearest, exactly, and said so; as upstream does."""
    for scheme, group_size in (("W4A16", 128), ("W4A16_ASYM", 32), ("NVFP4A16", None)):
        made = case(scheme, group_size, "static")
        direction = torch.nn.functional.normalize(torch.ones(COLUMNS), dim=0)
        made.gram.sub_(10 * made.gram.diagonal().sum() * direction.outer(direction))
        made.gram.diagonal().abs_()
        (ours, fell_back), (theirs, theirs_fell_back) = made.ours(), made.theirs()
        assert fell_back and theirs_fell_back, scheme
        assert torch.equal(ours, made.nearest()), scheme
        assert made.equal(ours, theirs) == 1, scheme
    return {}


def untouched() -> dict[str, Any]:
    """Neither the weight nor H is written to: others still need them."""
    made = case("W4A16", 128, "static")
    weight, gram = made.weight.float(), made.gram.clone()
    gptq.quantize(weight, made.gram, made.grid, made.args, DAMPENING)
    assert torch.equal(made.gram, gram) and torch.equal(weight, made.weight.float())
    return {}


def recorded() -> dict[str, Any]:
    """A CUDA graph of a block rounds to the same bits as the loop that it was recorded from."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU here"}
    for scheme, group_size in (("W4A16", 128), ("W4A16_ASYM", 32), ("W8A8", None)):
        made = case(scheme, group_size, "static").on("cuda")
        for multiplied_in in (torch.bfloat16, torch.float32):
            graph, _ = made.ours(multiplied_in)
            with patch.object(gptq, "_rounding", _not_recorded):
                loop, _ = made.ours(multiplied_in)
            assert torch.equal(graph, loop), (scheme, multiplied_in)
    return {}


def _not_recorded(
    args: QuantizationArgs, multiplied_in: torch.dtype, made: Any = gptq._rounding
) -> gptq.Rounding:
    """The same rounding, of a type that no graph is made of."""
    rounding = made(args, multiplied_in)
    return lambda *given: rounding(*given)


CHECKS = {
    **{f"gptq_{name}": (lambda name=name: like_upstream(name)) for name in SCHEMES},
    "gptq_dead_columns": dead_columns,
    "gptq_products_in_bf16": products_in_bf16,
    "gptq_stacked": stacked,
    "gptq_indefinite": indefinite,
    "gptq_untouched": untouched,
    "gptq_recorded": recorded,
}
