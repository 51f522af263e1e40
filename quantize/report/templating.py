"""The package's templates: a name that is not there is an error, lines of tags leave no gaps.

They run in Jinja's sandbox: a card may bring a template of its own, and `quantize verify` renders
that of a stranger.
"""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


def templates(**options: Any) -> jinja2.Environment:
    """Those in `quantize/report/templates`; `options` are what Markdown and HTML do differently.

    In a sandbox: a template cannot reach Python's internals, nor change what it is given.
    """
    return ImmutableSandboxedEnvironment(
        loader=jinja2.PackageLoader("quantize.report", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
