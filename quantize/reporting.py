"""What `quantize report` and `quantize compare` do: names → records → a page, or a table.

A RECORD is a card's `record.json`, a folder that holds one (a card artifact of a store, a published
folder), a run's folder, or a recipe whose card is in the store. What a record does not hold (the
positions, the changed answers) lies beside it in the store.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import QuantizeError, SourceError, UsageError
from quantize.protocol import write_atomic
from quantize.records import CompareRecord, Details, MeasureRecord
from quantize.report.page.shape import problems
from quantize.report.page.subject import Subject
from quantize.stages.card import SCHEMA
from quantize.store import Manifest, Store
from quantize.untrusted import JSON_LIMIT_BYTES, read_text

if TYPE_CHECKING:
    from quantize.report.side_by_side import SideBySide

PLACES = ("record.json", "quantize/record.json")
"""Where a folder holds a card's record: a card artifact, a published checkpoint."""
SHOWN_PROBLEMS = 5
NEEDED = {
    "recipe": ("name", "quantize"),
    "size": ("baseline_bytes", "candidate_bytes", "parameters"),
    "source": ("architecture",),
    "compress": (),
    "audit": ("checks", "quantized_modules"),
    "versions": (),
}
"""Blocks of a card's record beside the measurements, and what the page reads of them."""


@dataclass(frozen=True)
class Written:
    """Files of a report."""

    page: Path
    plots: tuple[Path, ...]

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"report": str(self.page), "plots": [str(path) for path in self.plots]}


def report(names: Sequence[str], output: Path | None, plots: Path | None, store: Store) -> Written:
    """Write the page of all RECORDs, and their pictures into the folder `plots` if one is given."""
    subjects = distinct([load(name, store) for name in names])
    page = output or Path(_file_name(subjects))
    _require_own(page)
    from quantize.report.page.html import render_report

    text = render_report(subjects)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, text)
    except OSError as error:
        raise UsageError(f"cannot write {page}: {error}", "choose another --output") from error
    return Written(page, _draw(subjects, plots) if plots is not None else ())


def compare(names: Sequence[str], store: Store) -> SideBySide:
    """The table of at least two results; a UsageError for fewer."""
    if len(names) < 2:
        raise UsageError(
            "there is one result to compare",
            "name two or more; `quantize report` shows a single one",
        )
    from quantize.report.side_by_side import side_by_side

    return side_by_side(distinct([load(name, store) for name in names]))


def _file_name(subjects: Sequence[Subject]) -> str:
    if len(subjects) > 1:
        return "comparison.report.html"
    name = re.sub(r"[^\w.-]+", "-", str(subjects[0].record["recipe"]["name"])).strip(".-")
    return f"{name or 'quantize'}.report.html"


def _require_own(page: Path) -> None:
    """A UsageError if another file than a report would be overwritten."""
    from quantize.report.page.html import GENERATOR

    if page.is_dir():
        raise UsageError(f"{page} is a folder", "name a file with --output")
    if page.exists():
        with open(page, encoding="utf-8", errors="replace") as file:
            head = file.read(400)
        if f'<meta name="generator" content="{GENERATOR}">' not in head:
            raise UsageError(f"{page} exists and is no report", "choose another --output")


def _draw(subjects: Sequence[Subject], folder: Path) -> tuple[Path, ...]:
    from quantize.report.page import figures, models
    from quantize.report.page.plots import save

    if len(subjects) == 1:
        drawn = figures.record_figures(subjects[0].record, subjects[0].details)
    else:
        drawn = models.figures(subjects)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(path for figure in drawn for path in save(figure, folder))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error}", "choose another --plots") from error


def distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """Labels that tell the subjects apart: with the method, or numbered, where names are equal."""
    found = []
    names = Counter(subject.label for subject in subjects)
    seen: Counter[str] = Counter()
    for subject in subjects:
        label = subject.label
        if names[label] > 1:
            quantize = subject.record["recipe"]["quantize"]
            label = f"{label} ({quantize['method']}, {quantize['scheme']})"
        seen[label] += 1
        if seen[label] > 1:
            label = f"{label} #{seen[label]}"
        found.append(
            Subject(label, subject.record, subject.details, subject.no_details, subject.place)
        )
    return found


# --- finding


def load(name: str, store: Store) -> Subject:
    """The record that `name` means, checked, with its details where they are found."""
    path = find(name, store)
    record = read_record(path)
    details, why = _details(record, path, store)
    return Subject(str(record["recipe"]["name"]), record, details, why, path.name)


def read_record(path: Path) -> dict[str, Any]:
    """A card's record, checked; a SourceError that says what is missing or wrong in it."""
    record: dict[str, Any] = _read(path)
    _require_card(record, path)
    found = _problems(record)
    if found:
        more = f" and {len(found) - SHOWN_PROBLEMS} more" if len(found) > SHOWN_PROBLEMS else ""
        raise SourceError(
            f"{path} is no complete record: {'; '.join(found[:SHOWN_PROBLEMS])}{more}",
            "make it again with `quantize run`",
        )
    return record


def find(name: str, store: Store) -> Path:
    """The file that `name` means; a UsageError that says what was looked for."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return path
    if path.is_dir():
        return _in_folder(path)
    return _of_recipe(name, store)


def _in_folder(folder: Path) -> Path:
    for place in PLACES:
        if (folder / place).is_file():
            return folder / place
    run = folder / "result.json"
    if run.is_file():
        places = _read(run).get("places", {})
        if isinstance(places, dict) and "record" in places:
            return Path(str(places["record"]))
        raise UsageError(
            f"the run in {folder} made no card", "run the recipe again, up to its card"
        )
    raise UsageError(
        f"{folder} holds no record: neither {' nor '.join(PLACES)}",
        "name a card's record.json, a published folder, or a recipe",
    )


def _of_recipe(name: str, store: Store) -> Path:
    """The card of a recipe as it stands now, or else the one card in the store of that name."""
    from quantize.resources import find_recipe

    try:
        recipe = find_recipe(name)
    except QuantizeError:
        return _by_name(name, store)
    from quantize.session import Session

    session = Session.open(str(recipe), (), store.root, online=False)
    entry = next(entry for entry in session.plan.stages if entry.id == "card")
    if entry.key is None:  # an offline plan does not know every key: then the name must do
        return _by_name(session.plan.recipe_name, store)
    artifact = store.get("card", entry.key)
    if artifact is not None:
        return artifact.file("record.json")
    others = _named(session.plan.recipe_name, store)
    listed = f"; other settings or versions of it made:\n{_listed(others, store)}" if others else ""
    raise UsageError(
        f"there is no card of {name} as it stands in {store.root}{listed}",
        f"quantize run {name}" + (", or name one of these folders" if others else ""),
    )


def _by_name(name: str, store: Store) -> Path:
    cards = _named(name, store)
    if not cards:
        raise UsageError(
            f"{name!r} is no file or folder, no recipe, and no card in {store.root} has this name",
            "name a card's record.json, a published folder, or a recipe; --store names another "
            "store",
        )
    if len(cards) > 1:
        raise UsageError(
            f"{len(cards)} cards in {store.root} are called {name}:\n{_listed(cards, store)}",
            "name one of these folders",
        )
    return store.path("card", cards[0].key) / "record.json"


def _named(name: str, store: Store) -> list[Manifest]:
    """Cards that a recipe of this name made, oldest first."""
    cards = [manifest for manifest in store.manifests("card") if manifest.recipe == name]
    return sorted(cards, key=lambda manifest: manifest.created)


def _listed(cards: Sequence[Manifest], store: Store) -> str:
    return "\n".join(f"  {card.created}  {store.path('card', card.key)}" for card in cards)


# --- reading


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is no number")


def _read(path: Path) -> Any:
    try:
        return json.loads(read_text(path, JSON_LIMIT_BYTES), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} cannot be read as JSON: {error}", "name a record.json"
        ) from error


def _require_card(record: Any, path: Path) -> None:
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema == SCHEMA:
        return
    if not isinstance(schema, str) or not schema.startswith("quantize."):
        raise SourceError(f"{path} is no record of quantize", "name the record.json of a card")
    if not schema.startswith("quantize.card/"):
        raise SourceError(
            f"{path} is the record of one stage ({schema}), not of a card",
            "name the recipe, or the record.json of its card (`quantize store ls`)",
        )
    raise SourceError(
        f"{path} is of another version of quantize: {schema}, this one reads {SCHEMA}",
        "make it again: `quantize run` repeats only the stages that changed",
    )


def _problems(record: dict[str, Any]) -> list[str]:
    found = []
    for block, names in NEEDED.items():
        if not isinstance(record.get(block), dict):
            found.append(f"{block} is missing")
            continue
        found += [f"{block}.{name} is missing" for name in names if name not in record[block]]
    for name in ("quantize", "source_name"):
        if name not in record:
            found.append(f"{name} is missing")
    if "compare" not in record:
        return found
    for side in ("baseline", "candidate"):
        found += problems(record.get(side), MeasureRecord, side)
    return found + list(problems(record["compare"], CompareRecord, "compare"))


def _details(record: dict[str, Any], path: Path, store: Store) -> tuple[Details | None, str]:
    """The details of the comparison, or why there are none.

    They lie in the store that the record is in; a record from elsewhere may be of the given store.
    """
    key = record.get("artifacts", {}).get("compare")
    if not isinstance(key, str) or not re.fullmatch(r"[\w-]+", key):
        return None, "the record does not name the comparison that it was made from"
    roots = [store.root]
    if path.parent.parent.name == "card":
        roots.insert(0, path.parent.parent.parent)
    for root in roots:
        file = root / "compare" / key / "details.json"
        if file.is_file():
            details = _read(file)
            found = list(problems(details, Details, "details"))
            if found:
                raise SourceError(
                    f"{file} is no complete record: {'; '.join(found[:SHOWN_PROBLEMS])}",
                    "make it again with `quantize run`",
                )
            return details, ""
    return None, (
        "evaluation documents are not published with a record, and the store on this machine does "
        f"not have the comparison {key[:12]}"
    )
