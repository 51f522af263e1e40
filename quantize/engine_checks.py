"""Can the engine that a recipe names quantize this checkpoint? Config and shapes alone."""

from __future__ import annotations

from quantize.checkpoint import Checkpoint
from quantize.engines import ENGINES, default_engine, stream
from quantize.findings import Finding
from quantize.modules import module_name
from quantize.recipe import Recipe
from quantize.source_checks import chosen_weights


def check_engine(checkpoint: Checkpoint, recipe: Recipe) -> list[Finding]:
    """Configs that it cannot load, code that it would have to run, shapes that it cannot pack."""
    name = recipe.quantize.engine
    engine = ENGINES[name]
    other = default_engine(recipe.quantize.method)
    hint = f"use engine {other}" if other != name else "use another method or quantize.format"
    findings = []
    if (reason := engine.cannot_read(checkpoint.config)) is not None:
        findings.append(Finding(f"engine {name} cannot take this checkpoint: {reason}", hint))
    if recipe.quantize.clip and (reason := stream.leaves(checkpoint.architecture, recipe)):
        what = f"quantize.clip: {reason}, and llm-compressor's AWQ does not clip"
        findings.append(Finding(what, "remove quantize.clip"))
    cannot_hold = getattr(engine, "cannot_hold", None)
    if cannot_hold is None:
        return findings
    refused: dict[str, list[str]] = {}
    for info, _rule in chosen_weights(checkpoint, recipe.quantize):
        if (reason := cannot_hold(module_name(info.name), info.shape)) is not None:
            refused.setdefault(reason, []).append(f"{info.name} {list(info.shape)}")
    for reason, tensors in refused.items():
        more = f" and {len(tensors) - 1} more tensors" if tensors[1:] else ""
        findings.append(
            Finding(
                f"engine {name} {reason}, unlike {tensors[0]}{more}",
                f"{hint}, or add these modules to quantize.ignore",
            )
        )
    return findings
