"""What a verification finds: problems of checks of a place, by whose signature is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.errors import UsageError

Kind = Literal["missing", "added", "changed", "link", "differs"]


@dataclass(frozen=True)
class Problem:
    """One thing that does not verify."""

    kind: Kind
    file: str
    text: str  # for a person, the file included


@dataclass(frozen=True)
class Check:
    """What one check found. `skipped`: it could not be made, which is no failure."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    summary: str
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, name: str, passed: str, problems: Sequence[Problem]) -> Check:
        """Failed with `problems`; without any, passed, with what can then be said."""
        if problems:
            return cls(name, "failed", "", tuple(problems))
        return cls(name, "passed", passed)


@dataclass(frozen=True)
class Trust:
    """Whose signature is expected: the holder of a key, an identity, or nobody in particular."""

    key: Path | None = None
    identity: str | None = None
    issuer: str | None = None

    @classmethod
    def of(cls, key: Path | None, identity: str | None, issuer: str | None) -> Trust:
        """From the command line; a UsageError where the options do not fit together."""
        if key is not None and (identity or issuer):
            raise UsageError("--key and --identity are two ways to sign", "leave out one of them")
        if (identity is None) != (issuer is None):
            raise UsageError(
                "--identity and --issuer belong together: anybody can have an identity somewhere",
                "give both, e.g. --issuer https://accounts.google.com",
            )
        return cls(key, identity, issuer)

    @property
    def named(self) -> bool:
        """Whether a signature is asked for."""
        return self.key is not None or self.identity is not None


@dataclass(frozen=True)
class Verification:
    """All checks of one place."""

    place: str
    commit: str | None
    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """No check failed; a skipped one is no failure."""
        return not any(check.outcome == "failed" for check in self.checks)

    def json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "place": self.place,
            "commit": self.commit,
            "verified": self.verified,
            "checks": [asdict(check) for check in self.checks],
        }
