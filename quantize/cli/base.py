"""What every command shares: its errors, its exit codes, its options."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from quantize.errors import Interrupted, QuantizeError, Said
from quantize.printable import printable

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


STORE = click.option(
    "--store",
    "store_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of finished artifacts  [default: the user's cache]",
)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)
FILE = click.Path(dir_okay=False, path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class Group(click.Group):
    """Turns every QuantizeError into two lines and its exit code; nothing else is caught."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; exit with the code that the error tree gives."""
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.Abort:
            fail(Interrupted("interrupted"))
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except (QuantizeError, Interrupted) as error:
            fail(error)
        except Exception as error:
            from quantize.refusals import refusal

            if isinstance(error, OSError) and (refused := refusal(error)) is not None:
                fail(refused)
            traceback.print_exc()
            click.echo("this is a bug of quantize: please report it with the lines above", err=True)
            sys.exit(1)


def fail(error: Said) -> NoReturn:
    """Print what happened and what to do, and exit."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(printable(error.message), err=True)
    if error.hint:
        click.secho("next: ", bold=True, nl=False, err=True)
        click.echo(printable(error.hint), err=True)
    sys.exit(error.exit_code)
