"""What `quantize measure` does: an artifact that was made elsewhere → a recipe that measures it.

What the artifact is comes from its config.json and the names of its tensors; whether that is true
is for the audit of the run to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.config_checks import states_format
from quantize.errors import SourceError, UsageError
from quantize.formats import weight_format
from quantize.initialize import measuring_recipe, slug
from quantize.modules import module_name
from quantize.protocol import write_atomic
from quantize.resources import find_checkpoint
from quantize.schemes import DEFAULT_SCHEME, GROUPED, SCHEMES
from quantize.stored import stored_in
from quantize.untrusted import TEXT_LIMIT_BYTES, read_text

UNKNOWN = "quantize measure reads compressed-tensors, AWQ (gemm) and GPTQ"


@dataclass(frozen=True)
class Request:
    """What is measured, and where the recipe goes."""

    artifact: str
    source: str
    suite: str | None = None  # by name or path; what fits the source if absent
    method: str | None = None  # how it was made, where its format does not say
    name: str | None = None
    output: Path | None = None
    force: bool = False


def write_recipe(request: Request) -> Path:
    """Write the recipe; an equal one that is there already is kept.

    UsageError for another file in its place, SourceError for an artifact that is none.
    """
    folder = find_checkpoint(request.artifact, Path.cwd(), "ARTIFACT")
    if folder is None:
        raise UsageError(
            f"{request.artifact} is no folder here",
            f"hf download {request.artifact} --local-dir FOLDER, and name the folder; or write its "
            "quantize.artifact into a recipe",
        )
    block = describe(read_checkpoint(folder, allow_quantized=True), request.method)
    name = request.name or slug(f"{folder.absolute().resolve().name}-measured")
    text = measuring_recipe(request.source, str(folder.absolute()), block, request.suite, name)
    output = request.output or Path(f"{name}.yaml")
    if output.exists() and not request.force and read_text(output, TEXT_LIMIT_BYTES) != text:
        raise UsageError(
            f"{output} exists and says something else",
            "choose another --output, or add --force; to go on with it: quantize run "
            + str(output),
        )
    try:
        write_atomic(output, text)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}", "choose another --output") from error
    return output


def describe(checkpoint: Checkpoint, method: str | None = None) -> dict[str, Any]:
    """The recipe's `quantize` block for a quantized checkpoint, without `artifact`.

    `method` is who chose the weights, for formats that do not say it. SourceError where the
    checkpoint is not quantized, or as no scheme of a recipe.
    """
    stored = stored_in(checkpoint)
    match stored.format.NAME:
        case "awq":
            block = _awq(stored.block)
        case "gptq":
            block = _gptq(stored.block)
        case _:
            block = _compressed_tensors(stored.block)
    if method is not None:
        block["method"] = method
    if block["scheme"] not in SCHEMES.get(block["method"], ()):
        raise UsageError(
            f"method {block['method']} does not produce {block['scheme']}",
            "name how it was made with --method",
        )
    return block | {"ignore": kept_linears(checkpoint, stored.format.SCALE)}


def kept_linears(checkpoint: Checkpoint, scale: str) -> list[str]:
    """Names of the linears that are not quantized, in order; `lm_head` also where it is tied.

    `scale` is the tensor that every quantized module has.
    """
    quantized = {
        name.removesuffix(f".{scale}") for name in checkpoint.tensors if name.endswith(f".{scale}")
    }
    kept = {module_name(info.name) for info in checkpoint.linears()} - quantized
    return sorted(kept | ({"lm_head"} - quantized))


def _awq(stated: Mapping[str, Any]) -> dict[str, Any]:
    bits, version = stated.get("bits", stated.get("w_bit")), str(stated.get("version", "gemm"))
    if bits != 4 or version.lower() != "gemm":
        raise SourceError(f"AWQ of {bits} bits, version {version}, is not measured", UNKNOWN)
    size = stated.get("group_size", stated.get("q_group_size"))
    scheme = "W4A16_ASYM" if stated.get("zero_point", True) else "W4A16"
    return {"method": "awq", "scheme": scheme, **_group(size), "format": "awq"}


def _gptq(stated: Mapping[str, Any]) -> dict[str, Any]:
    bits, symmetric = stated.get("bits"), bool(stated.get("sym", True))
    schemes = {(4, True): "W4A16", (4, False): "W4A16_ASYM", (8, True): "W8A16"}
    scheme = schemes.get((bits, symmetric)) if type(bits) is int else None
    if scheme is None:
        grid = "symmetric" if symmetric else "asymmetric"
        raise SourceError(f"GPTQ of {bits} bits, {grid}, is not measured", UNKNOWN)
    order = {"activation_order": "weight"} if stated.get("desc_act") else {}
    group = _group(stated.get("group_size"))
    return {"method": "gptq", "scheme": scheme, **group, "format": "gptq", **order}


def _group(size: Any) -> dict[str, Any]:
    """-1 is one scale an output in both formats."""
    if type(size) is not int or size == 0 or size < -1:
        raise SourceError(f"group_size of quantization_config is {size!r}", UNKNOWN)
    return {"group_size": "channel" if size == -1 else size}


def _compressed_tensors(stated: Mapping[str, Any]) -> dict[str, Any]:
    """One scheme for all linears, compared with each that a recipe can ask for."""
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        count = len(groups) if isinstance(groups, Mapping) else 0
        raise SourceError(
            f"it has {count} groups of formats, and one is what can be told from them",
            "write a recipe with quantize.artifact, and say in overrides which modules have which",
        )
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    size = weights.get("group_size") if isinstance(weights, Mapping) else None
    for method, scheme in _candidates():
        asked = (size or "channel") if scheme in GROUPED else None
        if states_format(weight_format(scheme, asked), group, str(stated.get("format"))):
            block: dict[str, Any] = {"method": method, "scheme": scheme}
            return block | ({} if asked is None else {"group_size": asked})
    raise SourceError("its quantization_config is no scheme of a recipe", "see docs/recipes.md")


def _candidates() -> list[tuple[str, str]]:
    """Every scheme, with the method that makes the fewest claims: rounding, where it can be."""
    order = ("rtn", "fp8", "int8", *DEFAULT_SCHEME)
    pairs = [(method, scheme) for method in order for scheme in SCHEMES[method]]
    found: dict[str, str] = {}
    for method, scheme in pairs:
        if method != "gguf":
            found.setdefault(scheme, method)
    return [(method, scheme) for scheme, method in found.items()]
