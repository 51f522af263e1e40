"""Valid inputs turned into broken ones, each with a name, an exit code and what must be said.

A :class:`tests.faults.place.Place` is a folder with a recipe and everything it names; a case spoils
one thing in it. `tests/unit/test_malformed.py` runs each through the command line.
"""

from __future__ import annotations

from tests.faults import broken_checkpoints, broken_texts, broken_weights
from tests.faults.place import Case


def cases() -> list[Case]:
    """All of them; names are unique."""
    made = [
        *broken_checkpoints.json_files(),
        *broken_checkpoints.kinds_of_file(),
        *broken_checkpoints.quantized(),
        *broken_checkpoints.code(),
        *broken_checkpoints.cards(),
        *broken_weights.weights(),
        *broken_weights.headers(),
        *broken_weights.indices(),
        *broken_texts.adapters(),
        *broken_texts.rows(),
        *broken_texts.texts(),
        *broken_texts.recipes(),
        *broken_texts.suites(),
        *broken_texts.names(),
        *broken_texts.folders(),
    ]
    names = [case.name for case in made]
    assert len(set(names)) == len(names), {name for name in names if names.count(name) > 1}
    return made
