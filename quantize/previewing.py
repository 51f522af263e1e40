"""What `quantize card` does: a record → the model card, without publishing it.

A RECORD is what `quantize report` takes. A card with a template of its own is made from the copy
that lies beside its record.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from quantize.errors import SourceError, UsageError
from quantize.protocol import write_atomic
from quantize.report.card import render_card
from quantize.report.card_template import read_template
from quantize.report.results import Record
from quantize.reporting import find, read_record
from quantize.store import Store

TEMPLATE = "card.md.j2"
"""Beside a card's `record.json`, in the store and where it was published."""


def preview(name: str, template: Path | None, store: Store) -> str:
    """The card of a RECORD as Markdown, by `template` if one is given."""
    path = find(name, store)
    record = read_record(path)
    own = template or _own_template(record, path)
    if own is None:
        return render_card(record)
    return render_card(record, read_template(own), str(own))


def _own_template(record: Record, path: Path) -> Path | None:
    """The template that the card was made with, if it was not the shipped one."""
    digest = record.get("card_template")
    if digest is None:
        return None
    own = path.parent / TEMPLATE
    text = read_template(own)
    if sha256(text.encode()).hexdigest() != digest:
        raise SourceError(
            f"{own} is not the template that this card was made with",
            "name one with --template to see the card by it",
        )
    return own


def write(text: str, output: Path, *, force: bool) -> None:
    """Write a preview; another file is overwritten only where that is asked for."""
    if output.exists() and not force:
        raise UsageError(f"{output} exists", "choose another --output, or add --force")
    try:
        write_atomic(output, text)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}", "choose another --output") from error
