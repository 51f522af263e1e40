"""The command line: the only module that prints or exits.

Everything heavy is imported inside the commands, so that `--help` costs a Python start.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from quantize import __version__
from quantize.errors import Interrupted, QuantizeError, Said, SourceError, UsageError
from quantize.printable import printable
from quantize.stop import handle_signals

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="quantize")
def main() -> None:
    """Quantize a fine-tuned checkpoint, measure what it cost, publish the result."""


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


@main.command()
@click.argument("recipe")
@STORE
@SET
@click.option("--only", metavar="STAGE", help="Run this stage alone.")
@click.option("--from", "first", metavar="STAGE", help="Start at this stage.")
@click.option("--until", "last", metavar="STAGE", help="Stop after this stage.")
@click.option("--quick", is_flag=True, help="Measure the suite's quick subset, in minutes.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--status", type=FILE, help="Keep a copy of the run's status.json here.")
@click.option("--metrics", type=FILE, help="Keep a file for Prometheus here, named *.prom.")
@JSON
def run(
    recipe: str,
    store_folder: Path | None,
    overrides: tuple[str, ...],
    only: str | None,
    first: str | None,
    last: str | None,
    quick: bool,
    dry_run: bool,
    status: Path | None,
    metrics: Path | None,
    as_json: bool,
) -> int:
    """Run RECIPE (a file, or the name of a shipped one): quantize, measure, serve, publish.

    Finished stages are kept: after a kill, the same command goes on where it was.
    """
    if quick:
        overrides = (*overrides, "evaluate.quick=true")
    with handle_signals():
        # takes a while: a signal may come meanwhile
        from quantize.session import Reports, Session

        reports = Reports.of(status, metrics)
        session = Session.open(recipe, overrides, store_folder, online=not dry_run)
        if dry_run:
            show_plan(session, as_json)
            return 0
        return session.run(
            only=only, first=first, last=last, as_json=as_json, write=click.echo, reports=reports
        )


@main.command()
@click.argument("recipe")
@click.option(
    "--price-per-hour",
    "prices",
    multiple=True,
    metavar="[CARD=]PRICE",
    help="Of the machine, or of what serves on CARD  [default: machine.price_per_hour]",
)
@click.option(
    "--tokens-per-second",
    "throughputs",
    multiple=True,
    metavar="[CARD=]RATE",
    help="Throughput, for what a million tokens cost.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take shapes from this config.json, for a checkpoint that is not here.",
)
@STORE
@SET
@JSON
def plan(
    recipe: str,
    prices: tuple[str, ...],
    throughputs: tuple[str, ...],
    config: Path | None,
    store_folder: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print the stages of RECIPE, their keys, what is done, and why the rest is not. Offline.

    Below: what each stage needs and costs, and which cards can quantize, measure and serve it;
    computed, see docs/capacity.md.
    """
    from quantize.session import Session

    session = Session.open(recipe, overrides, store_folder, online=False)
    show_plan(session, as_json, prices, throughputs, config)


@main.command()
@click.argument("recipe")
@STORE
@SET
@click.option("--offline", is_flag=True, help="Ask no Hub and no bucket.")
@JSON
def check(
    recipe: str,
    store_folder: Path | None,
    overrides: tuple[str, ...],
    offline: bool,
    as_json: bool,
) -> int:
    """Check all that can be known of RECIPE before weights load, and write nothing.

    A run checks the same first. Exits with the code that the run would end with.
    """
    from quantize.checking import check_recipe
    from quantize.report.checks import checks_text

    with handle_signals():
        report = check_recipe(recipe, overrides, store_folder, online=not offline)
    if as_json:
        click.echo(json.dumps(report.json(), indent=1, ensure_ascii=False))
    else:
        click.echo(checks_text(report), nl=False)
    return report.exit_code


def show_plan(
    session: Any,
    as_json: bool,
    prices: tuple[str, ...] = (),
    throughputs: tuple[str, ...] = (),
    config: Path | None = None,
) -> None:
    """Print a session's plan and what it needs, as tables or as JSON."""
    from quantize import costing
    from quantize.report import capacity
    from quantize.report.tables import plan_json, plan_table, render

    money = costing.money(prices, throughputs, session.resolved)
    needed = costing.figures(session.resolved, session.plan, session.store, money, config)
    if as_json:
        figures = {"needs": capacity.planned_json(needed)}
        click.echo(json.dumps(plan_json(session.plan) | figures, indent=1))
        return
    click.echo(render(plan_table(session.plan)), nl=False)
    if needed.stages:
        click.echo("\n" + render(capacity.figures_table(needed)), nl=False)
        click.echo("\n" + render(capacity.cards_table(needed)), nl=False)
    for note in (*session.plan.notes, *capacity.notes(needed)):
        click.echo(printable(f"note: {note}"))


@main.command()
@click.argument("recipe")
@click.option(
    "--budget",
    required=True,
    metavar="SIZE",
    help="Bits a quantizable parameter (4.5bits), or all weights (3.2GB, 350MiB).",
)
@click.option(
    "--schemes",
    metavar="LIST",
    help="Choose among these, e.g. W4A16_ASYM,W8A16,BF16  [default: what is served here]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The new recipe  [default: RECIPE-BUDGET.yaml]",
)
@click.option("--force", is_flag=True, help="Overwrite what an earlier search wrote.")
@STORE
@SET
@JSON
def search(
    recipe: str,
    budget: str,
    schemes: str | None,
    output: Path | None,
    force: bool,
    store_folder: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a recipe that gives each layer of RECIPE the scheme that serves a size best.

    Runs the stages up to compress if they are not done: they measure what each scheme does to each
    layer. Beside the recipe goes the whole frontier, as JSON and as a plot.
    """
    from quantize.report.frontier import frontier_table
    from quantize.report.summary import places_text
    from quantize.report.tables import render
    from quantize.searching import Request, search_recipe
    from quantize.session import Session

    request = Request.of(recipe, budget, schemes, output, force, overrides)
    with handle_signals():
        session = Session.open(recipe, overrides, store_folder, online=True)
        searched = search_recipe(session, request, as_json=as_json)
    if as_json:
        click.echo(json.dumps(searched.json(), indent=1, ensure_ascii=False))
        return
    click.echo(render(frontier_table(searched.found)), nl=False)
    click.echo(places_text(searched.places()))
    click.echo(f"next: quantize run {request.output}")


@main.command()
@click.argument("records", nargs=-1, required=True, metavar="RECORD...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The page  [default: NAME.report.html]",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the pictures into this folder, too, as PNG and SVG.",
)
@STORE
@JSON
def report(
    records: tuple[str, ...],
    output: Path | None,
    plots: Path | None,
    store_folder: Path | None,
    as_json: bool,
) -> None:
    """Write one HTML page on RECORD, or a comparison of several, from what was measured.

    RECORD is a recipe whose card is in the store, a published folder, a run's folder, or a card's
    record.json. The page needs no network and nothing beside it.
    """
    from quantize.reporting import report as write_report
    from quantize.session import open_store

    written = write_report(records, output, plots, open_store(store_folder))
    if as_json:
        click.echo(json.dumps(written.json(), indent=1, ensure_ascii=False))
        return
    click.echo(f"wrote {written.page}")
    if plots is not None:
        click.echo(f"wrote {len(written.plots)} pictures to {plots}")


@main.command()
@click.argument("place", metavar="PLACE")
@click.option(
    "--revision", metavar="R", help="Repository: a commit, branch or tag  [default: main]"
)
@click.option(
    "--key",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The signature must be by the holder of this public key (PEM).",
)
@click.option("--identity", help="The signature must be by this identity of Sigstore.")
@click.option("--issuer", metavar="URL", help="Who vouches for --identity.")
@click.option("--full", is_flag=True, help="Repository, URL: download the weights, too.")
@JSON
def verify(
    place: str,
    revision: str | None,
    key: Path | None,
    identity: str | None,
    issuer: str | None,
    full: bool,
    as_json: bool,
) -> int:
    """Tell whether PLACE is still what was published; exit 3 and say what was changed.

    PLACE is a folder, a repository on the Hub, or a URL. Compares every file with the listing, the
    statement and the card with the record, and the signature with --key or --identity. Of a
    repository, large files are compared by their sha256 on the Hub.
    """
    from quantize.progress import Progress
    from quantize.report.verification import verification_text
    from quantize.session import choose_view
    from quantize.verify.checks import verify_place
    from quantize.verify.verification import Trust

    trust = Trust.of(key, identity, issuer)
    progress = Progress(choose_view(as_json, click.echo))
    with handle_signals():
        try:
            found = verify_place(place, revision, trust, full=full, progress=progress)
        finally:
            progress.close()
    if as_json:
        click.echo(json.dumps(found.json(), indent=1, ensure_ascii=False))
    else:
        click.echo(verification_text(found), nl=False)
    return 0 if found.verified else SourceError.exit_code


@main.command()
@click.argument("record")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the card to this file  [default: print it]",
)
@click.option(
    "--template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Jinja template instead of the card's own; see docs/reading-a-card.md.",
)
@click.option("--force", is_flag=True, help="Overwrite OUTPUT.")
@STORE
def card(
    record: str,
    output: Path | None,
    template: Path | None,
    force: bool,
    store_folder: Path | None,
) -> None:
    """Print the model card of RECORD as it would be published, and publish nothing.

    RECORD is a recipe whose card is in the store, a published folder, a run's folder, or a card's
    record.json.
    """
    from quantize import previewing
    from quantize.session import open_store

    text = previewing.preview(record, template, open_store(store_folder))
    if output is None:
        click.echo(text, nl=False)
        return
    previewing.write(text, output, force=force)
    click.echo(f"wrote {output}")


@main.command()
@click.argument("recipe", required=False)
@click.option("--all", "everything", is_flag=True, help="Every environment.")
def setup(recipe: str | None, everything: bool) -> None:
    """Install the environments that RECIPE needs (or --all). `run` does it on first use."""
    from quantize.housekeeping import install

    if bool(recipe) == everything:
        raise UsageError("name a recipe, or --all", "quantize setup tiny-llama-awq")
    with handle_signals():
        for line in install(recipe, click.echo):
            click.echo(line)


@main.group()
def env() -> None:
    """The tools' environments."""


@env.command("list")
def env_list() -> None:
    """List the environments: purpose, lock, where it is, whether it is installed."""
    from quantize.housekeeping import environments
    from quantize.report.tables import environments_table, render

    click.echo(render(environments_table(environments())), nl=False)


@env.command("doctor")
def env_doctor() -> int:
    """Import in every installed environment what it is for; exit 4 when one is broken."""
    from quantize.housekeeping import doctor

    broken = 0
    for name, problem in doctor():
        click.echo(f"{name}: {problem or 'works'}")
        broken += bool(problem)
    return 4 if broken else 0


@main.group()
def store() -> None:
    """The finished artifacts."""


@store.command("ls")
@STORE
@JSON
def store_ls(store_folder: Path | None, as_json: bool) -> None:
    """List the artifacts: stage, key, recipe, size, age."""
    from quantize.report.tables import artifacts_json, artifacts_table, render
    from quantize.session import open_store

    artifacts = list(open_store(store_folder).artifacts())
    if as_json:
        click.echo(json.dumps(artifacts_json(artifacts), indent=1))
    else:
        click.echo(render(artifacts_table(artifacts)), nl=False)


@store.command("verify")
@STORE
def store_verify(store_folder: Path | None) -> int:
    """Hash every file of every artifact; exit 3 when something differs from its manifest."""
    from quantize.session import open_store

    damaged = 0
    count = 0
    opened = open_store(store_folder)
    for folder in opened.unreadable():
        damaged += 1
        click.echo(f"{folder}: no readable manifest of this kind, key and version")
    for artifact in opened.artifacts():
        count += 1
        for problem in artifact.damage(hash_files=True):
            damaged += 1
            click.echo(f"{artifact.path}: {problem}")
    click.echo(f"{count} artifacts verified, {damaged} problems")
    return 3 if damaged else 0


@store.command("gc")
@STORE
@click.option("--keep", "recipes", multiple=True, metavar="RECIPE", help="Keep what it uses.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def store_gc(store_folder: Path | None, recipes: tuple[str, ...], dry_run: bool) -> None:
    """Remove leftovers, old logs, and with --keep every artifact that no RECIPE uses."""
    from quantize.housekeeping import collect_garbage
    from quantize.report.tables import size

    total = 0
    for path, count in collect_garbage(store_folder, recipes, dry_run=dry_run):
        total += count
        click.echo(f"{'would remove' if dry_run else 'removed'} {path} ({size(count)})")
    click.echo(f"{size(total)} {'would be freed' if dry_run else 'freed'}")


@main.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from quantize.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


@main.command()
@click.argument("source")
@click.option(
    "--method", default="awq", show_default=True, help="awq, gptq, awq+gptq, rtn, fp8, int8"
)
@click.option("--name", help="Name of the recipe  [default: from the source and the method]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File.")
def init(source: str, method: str, name: str | None, output: Path | None) -> None:
    """Write a commented recipe for SOURCE, a checkpoint folder or a Hub repository."""
    from quantize.initialize import initial_recipe

    text = initial_recipe(source, method, name)
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists():
        raise UsageError(f"{output} exists", "choose another --output, or remove the file")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}", "choose another --output") from error
    click.echo(f"wrote {output}; next: quantize plan {output}")
