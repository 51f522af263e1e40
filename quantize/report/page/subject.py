"""What a report is about: a card record, and the details that lie beside it in a store."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.records import Details
from quantize.report.results import Record


@dataclass(frozen=True)
class Subject:
    """One model of a report."""

    label: str
    record: Record
    details: Details | None
    no_details: str = ""  # why there are none
    place: str = ""  # where the record was read, without its folder
