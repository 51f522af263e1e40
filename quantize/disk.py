"""What a disk's refusals mean: whose fault, which exit code, and what to type next.

Standard library only: workers report by it, too, inside their environments. Native code says what
the kernel said in its own words, so that a failure without an errno is recognized by them.

| errno | error | why that code |
|---|---|---|
| ENOSPC, EDQUOT, EFBIG | ResourceError (4) | the same command fails again until there is room |
| EIO, EUCLEAN, EBADMSG, ENODEV, ENXIO | ResourceError (4) | a dying disk is replaced, not retried |
| EROFS, EACCES, EPERM | ResourceError (4) | permissions, or a disk that the kernel gave up |
| ENOSYS, ENOLCK | ResourceError (4) | a file system without locks |
| EMFILE, ENFILE, ENOMEM | ResourceError (4) | limits of the machine |
| ESTALE, ETIMEDOUT, EREMOTEIO, EHOSTDOWN | TransientError (75) | a file server that was away |
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
BROKEN = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODEV, errno.ENXIO})
AWAY = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN})
UNREADABLE = BROKEN | {errno.ESTALE}
"""Reading a file ends with one of these when its bytes are lost, whatever its name says."""

HINTS = {
    **dict.fromkeys(FULL, "free some with `quantize store gc`, or name another place with --store"),
    **dict.fromkeys(
        BROKEN,
        "look at the kernel's log (dmesg) and replace the disk, or name another place with --store",
    ),
    **dict.fromkeys(AWAY, "the file server was away: run the same command again"),
    errno.EROFS: "the disk is mounted read-only: remount it, or name another place with --store",
    errno.EACCES: "give this user the permission, or name another place with --store",
    errno.EPERM: "give this user the permission, or name another place with --store",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
    errno.ENFILE: "the machine has too many open files: end other programs",
    **dict.fromkeys(
        (errno.ENOSYS, errno.ENOLCK),
        "this file system has no locks (flock): name a place on another one with --store",
    ),
    errno.ENOMEM: "the machine has no memory left: end other programs",
}

SPOKEN = tuple(sorted((*FULL, errno.EIO, errno.EROFS, errno.EMFILE)))
"""Recognized by the kernel's words alone, where no errno is given: nothing else says these."""


@dataclass(frozen=True)
class Fault:
    """A refusal of the machine: `kind` names a class of :mod:`quantize.errors`."""

    number: int
    kind: str
    message: str
    hint: str


def fault(error: BaseException) -> Fault | None:
    """What the machine refused, if that is what `error`, or what it was raised from, says."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None:
            number = spoken(str(cause))
        if number in HINTS:
            kind = "TransientError" if number in AWAY else "ResourceError"
            return Fault(number, kind, _describe(number, cause), HINTS[number])
    return None


def spoken(text: str) -> int | None:
    """The errno whose words stand in a text, such as a log or an error of native code."""
    return next((n for n in SPOKEN if re.search(re.escape(os.strerror(n)), text)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _describe(number: int, error: BaseException) -> str:
    """`the disk is full` and the like, with the words and the place that the kernel gave."""
    heads = {
        **dict.fromkeys(FULL, "the disk is full"),
        errno.EFBIG: "a file is larger than the disk or a limit allows",
        **dict.fromkeys(BROKEN, "the disk fails"),
        **dict.fromkeys(AWAY, "the file server does not answer"),
        errno.EROFS: "the disk cannot be written",
    }
    said = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
    return f"{heads.get(number, 'the system refuses')}: {said}"


def room(place: Path, needed: int | None = None) -> str:
    """`N bytes are free at PLACE, about M more are needed`, for a message about a full disk."""
    try:
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        found = os.statvfs(there)
    except OSError as error:
        free = f"{place} cannot be looked at ({error.strerror})"
    else:
        free = f"{found.f_bavail * found.f_frsize} bytes are free at {place}"
        if found.f_files and not found.f_favail:
            free += ", and no inode for another file"
    return free if needed is None else f"{free}, about {needed} bytes more are needed"
