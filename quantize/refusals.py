"""A disk's refusal as the error that a user meets: what, where, how much room, what next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize import errors
from quantize.disk import FULL, fault, room, spoken
from quantize.errors import QuantizeError, ResourceError


def refusal(
    error: OSError, what: str = "", place: Path | None = None, needed: int | None = None
) -> QuantizeError | None:
    """The error for what the system refused; None for what is a bug of ours (a missing file).

    On a full disk the message says how much is free at `place`, and about how much `needed` more
    is, in bytes, where that is known.
    """
    found = fault(error)
    if found is None:
        return None
    message = f"{what}: {found.message}" if what else found.message
    if found.number in FULL and place is not None:
        message += f"; {room(place, needed)}"
    return errors.KINDS[found.kind](message, found.hint)


@contextmanager
def refusals(
    what: str, place: Path, needed: Callable[[], int | None] = lambda: None
) -> Iterator[None]:
    """What the system refuses inside is no bug of ours: raised as :func:`refusal` says.

    A worker or server that met a full disk knows neither the place nor what is still to come: that
    is added to its error.
    """
    try:
        yield
    except ResourceError as error:
        if spoken(error.message) not in FULL or " bytes are free at " in error.message:
            raise
        start = f"{what}: " if what and not error.message.startswith(what) else ""
        message = f"{start}{error.message}; {room(place, needed())}"
        raise ResourceError(message, error.hint) from error
    except OSError as error:
        found = refusal(error, what, place, needed())
        if found is None:
            raise
        raise found from error
