"""The command line: the only package that prints or exits.

Everything heavy is imported inside the commands, so that `--help` costs a Python start.
"""

from __future__ import annotations

import click

from quantize import __version__
from quantize.cli import recipes, results, upkeep
from quantize.cli.base import CONTEXT, Group, fail

__all__ = ["fail", "main"]


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="quantize")
def main() -> None:
    """Quantize a fine-tuned checkpoint, measure what it cost, publish the result."""


for command in (
    *(recipes.run, recipes.measure, recipes.plan, recipes.check, recipes.search),
    *(recipes.schema, recipes.init),
    *(results.report, results.compare, results.convert, results.verify, results.card),
    *(upkeep.setup, upkeep.env, upkeep.store),
):
    main.add_command(command)
