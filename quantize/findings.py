"""What a check found wrong, collected so that everything is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quantize.errors import (
    ConflictError,
    CredentialsError,
    QuantizeError,
    ResourceError,
    SourceError,
    UsageError,
)


@dataclass(frozen=True)
class Finding:
    """One thing that must be put right, what to do about it, and the error class it belongs to."""

    message: str
    hint: str
    error: type[QuantizeError] = SourceError

    @classmethod
    def of(cls, error: QuantizeError) -> Finding:
        """The finding that an exception reports."""
        kind = UsageError if isinstance(error, UsageError) else type(error)  # not RecipeError
        return cls(error.message, error.hint, kind)


@dataclass
class Told:
    """What a check says: what must be put right, what is worth knowing, why it was not made."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""


def raise_findings(findings: Sequence[Finding]) -> None:
    """Raise one error that lists every finding with its remedy; without findings do nothing.

    Its class is that of the lowest exit code among them (usage, source, resources, credentials,
    conflict): what is wrong with the input is put right before anyone buys a disk.
    """
    if not findings:
        return
    classes = {finding.error for finding in findings}
    order = (UsageError, SourceError, ResourceError, CredentialsError, ConflictError)
    error = next((cls for cls in order if cls in classes), findings[0].error)
    if len(findings) == 1:
        raise error(findings[0].message, findings[0].hint)
    lines = [f"{len(findings)} things must be put right first"]
    for number, finding in enumerate(findings, 1):
        lines.append(f"  {number}. {finding.message}")
        if finding.hint:
            lines.append(f"     → {finding.hint}")
    raise error("\n".join(lines), "put these right and run the command again")
