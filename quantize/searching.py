"""What `quantize search` does: recipe → stages up to compress → search → files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import SourceError, ToolError, UsageError
from quantize.mixed_recipe import mixed_recipe
from quantize.modules import matches
from quantize.protocol import write_json
from quantize.recipe import Recipe
from quantize.recipe_file import load_recipe
from quantize.report.frontier import frontier_json
from quantize.report.frontier_plot import draw
from quantize.resources import find_recipe, shipped_root
from quantize.schemes import DEFAULT_SCHEME, SCHEMES
from quantize.search import Budget, Found, parse_budget, search
from quantize.sensitivity import BF16, Sensitivity, read_sensitivity, units
from quantize.servers import cannot_serve
from quantize.session import Session
from quantize.stages.base import Resolved
from quantize.store import Artifact
from quantize.yaml_edit import KeyPath
from quantize.yaml_values import parse

FOUR_BITS = ("W4A16_ASYM", "W4A16")
EIGHT_BITS = ("W8A16", "FP8_DYNAMIC")
"""Best first: FP8_DYNAMIC rounds activations, too, which the sensitivity record does not see."""


@dataclass(frozen=True)
class Request:
    """The command line, checked as far as it can be before anything runs."""

    recipe: Path
    budget: Budget
    schemes: tuple[str, ...] | None  # None: the default ones
    output: Path
    overrides: tuple[str, ...]

    @classmethod
    def of(
        cls,
        recipe: str,
        budget: str,
        schemes: str | None,
        output: Path | None,
        force: bool,
        overrides: tuple[str, ...],
    ) -> Request:
        """Parse the options; a UsageError for a mistake or a file that would be overwritten."""
        path = find_recipe(recipe)
        allowed = parse_budget(budget)
        names = None
        if schemes is not None:
            names = tuple(dict.fromkeys(name.strip() for name in schemes.split(",")))
        if output is None:
            shipped = path.resolve().parent == (shipped_root() / "recipes").resolve()
            folder = Path() if shipped else path.parent
            output = folder / f"{path.stem}-{allowed.slug}.yaml"
        request = cls(path, allowed, names, output, overrides)
        there = [str(file) for file in request.files.values() if file.exists()]
        if there and not force:
            raise UsageError(
                f"{', '.join(there)} exists", "choose another --output, or overwrite with --force"
            )
        if output.exists() and output.samefile(path):
            raise UsageError(f"--output {output} is the given recipe", "choose another --output")
        return request

    @property
    def files(self) -> dict[str, Path]:
        """What is written, by what it is."""
        stem = self.output.with_suffix("")
        return {
            "recipe": self.output,
            "frontier": Path(f"{stem}.frontier.json"),
            "plot": Path(f"{stem}.frontier.png"),
            "plot (svg)": Path(f"{stem}.frontier.svg"),
        }


@dataclass(frozen=True)
class Searched:
    """What was found and where it was written."""

    recipe: str
    found: Found
    files: dict[str, Path]

    def places(self) -> dict[str, str]:
        """Where a person finds what."""
        return {name: str(path) for name, path in self.files.items()}

    def json(self) -> dict[str, Any]:
        """The frontier file's contents and where all files are."""
        return {"recipe": self.recipe, **frontier_json(self.found), "files": self.places()}


def search_recipe(session: Session, request: Request, *, as_json: bool) -> Searched:
    """Make the sensitivity record if it is not there, search it, and write the files."""
    recipe = session.resolved.recipe
    _require_sensitivity(recipe)
    artifacts = session.artifacts_until("compress", as_json=as_json)
    record = _record(artifacts["compress"])
    ignore = recipe.quantize.ignore
    schemes = request.schemes or default_schemes(recipe, session.resolved.accelerator)
    _require_measured(schemes, record)
    among = units(record, schemes, lambda name: matches(name, ignore))
    rest = rest_bytes(artifacts["fetch"].json("source.json"), sum(u.parameters for u in among))
    found = search(among, request.budget, rest, record.tokens)
    _write(session.resolved, request, found)
    return Searched(recipe.name, found, request.files)


def default_schemes(recipe: Recipe, accelerator: str) -> tuple[str, ...]:
    """4 bits of the recipe's own kind, the best 8 bits that the server can mix in here, and BF16.

    vLLM has a kernel for each layer's own scheme, so what it serves alone it serves mixed.
    """
    quantize = recipe.quantize
    own = [quantize.effective_scheme, DEFAULT_SCHEME[quantize.method], *SCHEMES[quantize.method]]
    four = next((scheme for scheme in own if scheme in FOUR_BITS), FOUR_BITS[0])
    server, form = recipe.serve.engine, quantize.effective_format
    eight = [s for s in EIGHT_BITS if cannot_serve(server, form, s, accelerator) is None]
    return (four, *eight[:1], BF16.scheme)


def rest_bytes(source: dict[str, Any], parameters: int) -> int:
    """Bytes of the tensors that are not quantized: embeddings, head, norms, biases, ignored ones.

    The engine stores them in BF16: two bytes for each of the source's parameters (all elements of
    all tensors in its files, from `source.json`) that is not one of the `parameters` of the linears
    in the search. A tied head is in no file of its own and counts once.
    """
    rest = int(source["parameters"]) - parameters
    if rest < 0:
        raise ToolError(f"the linears have {-rest} parameters more than the whole checkpoint")
    return 2 * rest


def _require_sensitivity(recipe: Recipe) -> None:
    """A UsageError for recipes of which one knows beforehand that they make no record."""
    quantize = recipe.quantize
    if quantize.engine != "stream":
        raise UsageError(
            f"quantize.engine is {quantize.engine}: only the streaming engine measures what each "
            "scheme does to each linear",
            "set quantize.engine to stream, or leave it out",
        )
    if not quantize.needs_calibration:
        raise UsageError(
            f"method {quantize.method} with {quantize.effective_scheme} reads no calibration data, "
            "without which no output error is known",
            "search a recipe with a calibrated method, for example --set quantize.method=awq+gptq "
            "--set quantize.scheme=null, with a calibration block",
        )


def _record(compress: Artifact) -> Sensitivity:
    """The record of a compress artifact; a SourceError where the engine could not make one."""
    try:
        path = compress.file("sensitivity.json")
    except KeyError:
        why = compress.json("compress.json").get("engine_note", "another engine made it")
        raise SourceError(
            f"the compress stage left no sensitivity record: {why}",
            "search needs an architecture that the streaming engine knows; write overrides by hand",
        ) from None
    return read_sensitivity(path.read_bytes(), str(path))


def _require_measured(schemes: Sequence[str], record: Sensitivity) -> None:
    known = {candidate.scheme for linear in record.linears for candidate in linear.candidates}
    if unknown := [scheme for scheme in schemes if scheme not in known]:
        raise UsageError(
            f"--schemes: {', '.join(unknown)} was not measured",
            f"choose among {', '.join(sorted(known))}",
        )


def _write(resolved: Resolved, request: Request, found: Found) -> None:
    """All files, the recipe last and only when it can be read again."""
    files = request.files
    text = _with_schema(request.recipe.read_text(encoding="utf-8-sig"), request.recipe)
    moved = _set_values(request.overrides) | _moved_paths(resolved, request)
    new = mixed_recipe(text, request.recipe.name, resolved.recipe, found, moved)
    temporary = request.output.with_name(f".{request.output.name}.tmp")
    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(new, encoding="utf-8")
        load_recipe(temporary)
        write_json(files["frontier"], {"recipe": resolved.recipe.name} | frontier_json(found))
        draw(found, resolved.recipe.name, files["plot"], files["plot (svg)"])
        os.replace(temporary, request.output)
    except OSError as error:
        raise UsageError(
            f"cannot write {request.output}: {error}", "choose another --output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _with_schema(text: str, recipe: Path) -> str:
    """The editor's comment with the schema's address, which begins at the recipe's folder."""
    found = re.match(r"# yaml-language-server: \$schema=(\S+)", text)
    if found is None or not (schema := recipe.parent / found[1]).is_file():
        return text
    return text[: found.start(1)] + schema.resolve().as_uri() + text[found.end(1) :]


def _set_values(overrides: Sequence[str]) -> dict[KeyPath, Any]:
    """``--set`` options, which have been checked, as changes to the file."""
    pairs = [override.partition("=") for override in overrides]
    return {
        tuple(part.strip() for part in key.strip().split(".")): parse(value).value
        for key, _, value in pairs
    }


LOCAL_INPUTS: dict[KeyPath, str] = {
    ("model", "source"): "model",
    ("model", "adapter"): "adapter",
    ("calibration", "source"): "calibration",
    ("evaluate", "suite"): "suite",
}
"""Keys that may hold a path from the recipe's folder, and their names in `Resolved.paths`."""


def _moved_paths(resolved: Resolved, request: Request) -> dict[KeyPath, Any]:
    """Absolute paths of what lies in the old recipe's folder, if the new one lies elsewhere."""
    old, new = resolved.folder.resolve(), request.output.parent.resolve()
    if old == new:
        return {}
    return {
        key: str(resolved.paths[name].absolute())
        for key, name in LOCAL_INPUTS.items()
        if name in resolved.paths and _written(resolved.recipe, key, old)
    }


def _written(recipe: Recipe, key: KeyPath, folder: Path) -> bool:
    """Whether a key's text is a path that begins at `folder`."""
    value: Any = recipe
    for part in key:
        value = getattr(value, part)
    path = Path(value)
    return not path.is_absolute() and not value.startswith("~") and (folder / path).exists()
