"""Every error a user can meet, its exit code, and what to type next.

The tree (exit code in parentheses)::

    QuantizeError
    ├── UsageError (2)          a wrong command line
    │   └── RecipeError (2)     one or more problems in a recipe or a suite file
    ├── SourceError (3)         checkpoint, adapter, calibration or evaluation data
    ├── ResourceError (4)       memory, disk, a GPU, a port, an environment that does not install
    ├── CredentialsError (5)    token missing, wrong, or without permission
    ├── ConflictError (6)       the target moved while we published
    ├── GateError (7)           measured, and worse than the recipe allows
    ├── TransientError (75)     try the same command again
    └── ToolError (1)           a tool failed in a way that nobody foresaw

    Interrupted (75)            stopped by a signal at a resumable point

Anything else is a bug of ours: exit code 1 and a traceback. ``Interrupted`` is a ``BaseException``,
like Python's own ``KeyboardInterrupt``: it is raised wherever the run happens to be, and no
``except Exception`` there, of ours or of a library, may take it for a failure of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Said(BaseException):
    """What happened and why (`message`), and what to do next (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The class's name, as it is written to ``result.json``."""
        return type(self).__name__


class Interrupted(Said):
    """A signal stopped the run; what was finished stays finished."""

    exit_code = 75


class QuantizeError(Said, Exception):
    """A failure that a user can meet."""


class UsageError(QuantizeError):
    """The command line asks for something that does not exist or does not fit."""

    exit_code = 2


MOST_SHOWN = 50
"""Mistakes of one file that are listed."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a YAML file: where (1-based line, dotted key path) and what.

    Line 0 is the command line: `path` then names the option, e.g. ``--set quantize.method``.
    """

    line: int
    path: str
    message: str

    def render(self, file: str) -> str:
        """``file:line: path: message``, the form that editors make clickable."""
        where = f"{file}:{self.line}"
        if self.line == 0:
            return f"{self.path}: {self.message}"
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class RecipeError(UsageError):
    """All the mistakes of one recipe (or suite) file at once."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.path)))
        noun = "mistake" if len(self.problems) == 1 else "mistakes"
        lines = [f"{len(self.problems)} {noun} in {file}"]
        lines += ["  " + problem.render(file) for problem in self.problems[:MOST_SHOWN]]
        if self.problems[MOST_SHOWN:]:
            lines.append(f"  and {len(self.problems) - MOST_SHOWN} more")
        super().__init__("\n".join(lines), "correct the lines above and run the command again")


class SourceError(QuantizeError):
    """A checkpoint, an adapter, or calibration or evaluation data cannot be used."""

    exit_code = 3


class ResourceError(QuantizeError):
    """Memory, disk, an accelerator, a port or an environment is missing."""

    exit_code = 4


class CredentialsError(QuantizeError):
    """A token is missing, wrong, or lacks a permission."""

    exit_code = 5


class ConflictError(QuantizeError):
    """The publishing target changed under us."""

    exit_code = 6


class GateError(QuantizeError):
    """The candidate was measured and falls outside the recipe's margins."""

    exit_code = 7


class TransientError(QuantizeError):
    """Something outside failed in a way that often passes: run the same command again."""

    exit_code = 75


class ToolError(QuantizeError):
    """A tool (llm-compressor, vLLM, lm-eval, uv) failed in a way that nobody foresaw."""

    exit_code = 1


KINDS: dict[str, type[QuantizeError]] = {
    cls.__name__: cls
    for cls in (
        UsageError,
        SourceError,
        ResourceError,
        CredentialsError,
        ConflictError,
        GateError,
        TransientError,
        ToolError,
    )
}
"""Error classes that a worker may name in its result file."""
