"""What a check found wrong, collected so that everything is reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """What a check says: what must be put right, and what is worth knowing.

    `skipped` says why there is nothing to check, `unchecked` why it could not be made.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    unchecked: str = ""


@dataclass
class Faults:
    """Errors of steps that do not need each other, kept so that all are reported at once."""

    errors: list[QuantizeError] = field(default_factory=list)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the error that ends the block; a signal, which is none, still ends everything."""
        try:
            yield
        except QuantizeError as error:
            self.errors.append(error)

    @property
    def findings(self) -> list[Finding]:
        """The errors as findings."""
        return [Finding.of(error) for error in self.errors]

    def raise_all(self) -> None:
        """Raise the one error as it is, several as one; nothing without any."""
        if len(self.errors) == 1:
            raise self.errors[0]
        raise_findings(self.findings)


def raise_findings(findings: Sequence[Finding]) -> None:
    """Raise the one error of :func:`error_of`; without findings do nothing."""
    error = error_of(findings)
    if error is not None:
        raise error


def error_of(findings: Sequence[Finding]) -> QuantizeError | None:
    """One error that lists every finding with its remedy; None without findings.

    Its class is that of the lowest exit code among them (usage, source, resources, credentials,
    conflict): what is wrong with the input is put right before anyone buys a disk.
    """
    if not findings:
        return None
    classes = {finding.error for finding in findings}
    order = (UsageError, SourceError, ResourceError, CredentialsError, ConflictError)
    error = next((cls for cls in order if cls in classes), findings[0].error)
    if len(findings) == 1:
        return error(findings[0].message, findings[0].hint)
    lines = [f"{len(findings)} things must be put right first"]
    for number, finding in enumerate(findings, 1):
        lines.append(f"  {number}. {finding.message}")
        if finding.hint:
            lines.append(f"     → {finding.hint}")
    return error("\n".join(lines), "put these right and run the command again")
