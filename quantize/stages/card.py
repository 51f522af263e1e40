"""card: everything that is known of an artifact in one record, and the model card made from it.

Writes `record.json`::

    {"schema": "quantize.card/3", "quantize": version of this program,
     "recipe": the recipe with its defaults, without `publish` and `environments`,
     "target": "owner/name" if the recipe publishes to the Hub,
     "source_name", "adapter_name"?, "fine_tuned_from"?, "base_models": [Hub ids],
     "source": source.json without its folder,
     "adapter"?: adapter.json, where the adapter is kept apart,
     "size": {"baseline_bytes", "candidate_bytes", "parameters"},   # files of weights
     "plots": [names of the pictures in `plots/`], "card_template"?: sha256 of `card.md.j2`,
     "calibration"?: calibrate.json + "data_digest" and "tokens_sha256",
     "compress": compress.json, "audit": audit.json,
     "baseline"?, "candidate"?, "compare"?: their record.json,
     "artifacts": {role: key of the artifact in the store that it was made from},
     "key_inputs": {role: everything that this key is the hash of},
     "versions": {role: versions of the tools}}

`README.md`, which is a function of that record alone (and of `card.md.j2`, the recipe's own
template, where it has one), `plots/*.png`, and `eval_results/*.yaml`, which go to `.eval_results/`.
"""

from __future__ import annotations

from hashlib import sha256
from importlib import metadata
from typing import TYPE_CHECKING, Any

from quantize import __version__
from quantize.errors import SourceError
from quantize.model_files import is_weights
from quantize.protocol import write_atomic, write_json
from quantize.report.redact import base_name, redact
from quantize.report.results import HUB_ID

if TYPE_CHECKING:
    from quantize.recipe import Recipe
    from quantize.report.page.figures import Figure
    from quantize.stages.base import Resolved, StageContext

VERSION = 4

SCHEMA = "quantize.card/3"
MEASURED = ("baseline", "candidate", "compare")


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: the card is text."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """Everything the card says beyond its inputs."""
    inputs = {
        "recipe": recipe_values(resolved.recipe),
        "target": _target(resolved.recipe),
        "quantize": __version__,
        "matplotlib": metadata.version("matplotlib"),  # another one draws other bytes
    }
    if resolved.recipe.publish.card_template is not None:
        inputs["template"] = resolved.digests["card_template"]
    return inputs


def run(context: StageContext) -> None:
    """Write `record.json`, `README.md`, the pictures and the benchmarks' results."""
    from quantize.report.card import eval_results, render_card  # jinja2: no plan pays for it

    record = build_record(context)
    figures = _figures(context, record)
    if figures:
        from quantize.report.card_plots import draw

        draw(figures, context.files / "plots")
    template = _take_template(context) if "card_template" in record else None
    write_json(context.files / "record.json", record)
    name = context.recipe.publish.card_template or "the shipped template"
    write_atomic(context.files / "README.md", render_card(record, template, name))
    for file, text in eval_results(record).items():
        (context.files / "eval_results").mkdir(exist_ok=True)
        write_atomic(context.files / "eval_results" / file, text)


def _take_template(context: StageContext) -> str:
    """The recipe's template; its copy goes with the card, which can then be made again."""
    from quantize.report.card_template import read_template

    path = context.resolved.paths["card_template"]
    text = read_template(path)
    if sha256(text.encode()).hexdigest() != context.resolved.digests["card_template"]:
        raise SourceError(f"{path} changed after the run began", "run the command again")
    write_atomic(context.files / "card.md.j2", text)
    return text


def _figures(context: StageContext, record: dict[str, Any]) -> list[Figure]:
    """The pictures as data; without a comparison there are none."""
    if "compare" not in context.inputs:
        return []
    from quantize.report.card_plots import card_figures

    return card_figures(record, context.inputs["compare"].json("details.json"))


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe with its defaults filled in, without what concerns this machine alone."""
    # nor where an endpoint of somebody's listens
    excluded: Any = dict.fromkeys(("publish", "environments", "machine"), True)
    excluded["serve"] = {"endpoints"}
    values = recipe.model_dump(mode="json", exclude=excluded, exclude_none=True)
    values["quantize"]["scheme"] = recipe.quantize.effective_scheme
    if recipe.quantize.effective_format != "compressed-tensors":  # which every card meant before
        values["quantize"]["format"] = recipe.quantize.effective_format
    group_size = recipe.quantize.effective_group_size
    if group_size is not None:
        values["quantize"]["group_size"] = group_size
    del values["quantize"]["overrides"]
    if recipe.quantize.overrides:
        values["quantize"]["overrides"] = [
            {key: value for key, value in override.items() if value is not None}
            for override in recipe.quantize.effective_overrides
        ]
    return values


def build_record(context: StageContext) -> dict[str, Any]:
    """The card's record, without local paths or tokens."""
    inputs, recipe = context.inputs, context.recipe
    source: dict[str, Any] = inputs["fetch"].json("source.json")
    apart = inputs["adapter"].json("adapter.json") if "adapter" in inputs else None
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "quantize": __version__,
        "recipe": recipe_values(recipe),
        **_names(recipe, source, apart),
        "source": {key: value for key, value in source.items() if key != "folder"},
        "size": _size(context, source),
        "compress": inputs["compress"].json("compress.json"),
        "audit": inputs["audit"].json("audit.json"),
        "artifacts": {role: item.manifest.key for role, item in inputs.items()},
        "key_inputs": {role: dict(item.manifest.key_inputs) for role, item in inputs.items()},
        "versions": {role: dict(item.manifest.versions) for role, item in inputs.items()},
    }
    record["source"]["license"] = recipe.model.license or source["license"]
    target = _target(recipe)
    if target is not None:
        record["target"] = target
    if apart is not None:
        record["adapter"] = apart | {"source": record["adapter_name"]}
    if "calibrate" in inputs:
        record["calibration"] = _calibration(context)
    for role in MEASURED:
        if role in inputs:
            record[role] = inputs[role].json("record.json")
    if recipe.publish.card_template is not None:
        record["card_template"] = context.resolved.digests["card_template"]
    found: dict[str, Any] = redact(record)
    return found | {"plots": [figure.name for figure in _figures(context, found)]}


def _target(recipe: Recipe) -> str | None:
    return recipe.publish.hub.repo if recipe.publish.hub else None


def _names(recipe: Recipe, source: dict[str, Any], apart: dict[str, Any] | None) -> dict[str, Any]:
    """What the model's ancestors are called; a local folder has a base name and no Hub id."""
    model = recipe.model
    hub_ids: list[str] = [source["repo"]] if "repo" in source else []
    found: dict[str, Any] = {
        "source_name": source.get("repo") or base_name(model.source) or "a local folder"
    }
    complete = bool(hub_ids)
    if apart is not None:  # the published weights are the source's alone
        found["adapter_name"] = apart["source"] if "commit" in apart else base_name(apart["source"])
    elif "adapter" in source:
        adapter = source["adapter"]
        on_hub = "commit" in adapter
        found["adapter_name"] = adapter["source"] if on_hub else base_name(adapter["source"])
        hub_ids.append(adapter["source"])
        complete = complete and on_hub
    if model.base is not None:
        found["fine_tuned_from"] = (
            model.base if HUB_ID.fullmatch(model.base) else base_name(model.base)
        )
    # Merged with something that nobody can look up, it is no quantization of its parts.
    return found | {"base_models": hub_ids if complete else []}


def _size(context: StageContext, source: dict[str, Any]) -> dict[str, int]:
    """Bytes of the weights' files before and after, and elements of the original's tensors."""
    after = context.inputs["compress"].manifest.files
    return {
        "baseline_bytes": sum(
            file["bytes"] for file in source["files"] if file["name"].endswith(".safetensors")
        ),
        "candidate_bytes": sum(file.bytes for file in after if is_weights(file.name)),
        "parameters": source["parameters"],
    }


def _calibration(context: StageContext) -> dict[str, Any]:
    artifact = context.inputs["calibrate"]
    tokens = next(entry for entry in artifact.manifest.files if entry.name == "tokens.npz")
    statistics: dict[str, Any] = artifact.json("calibrate.json")
    return statistics | {
        "data_digest": artifact.manifest.key_inputs["with"]["data"],
        "tokens_sha256": tokens.sha256,
    }
