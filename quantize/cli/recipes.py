"""Commands that take a recipe: run, plan, check, search; and those that help to write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantize.cli.base import FILE, JSON, SET, STORE
from quantize.errors import UsageError
from quantize.printable import printable
from quantize.stop import handle_signals


@click.command()
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


@click.command()
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--source", required=True, metavar="SOURCE", help="What it was made from, in BF16.")
@click.option("--suite", metavar="NAME", help="What is measured  [default: what fits SOURCE]")
@click.option("--method", metavar="M", help="How it was made, where its format does not say it.")
@click.option("--name", help="Name of the recipe  [default: from the artifact's]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The recipe  [default: NAME.yaml]",
)
@click.option("--force", is_flag=True, help="Overwrite the recipe.")
@STORE
@SET
@click.option("--quick", is_flag=True, help="Measure the suite's quick subset, in minutes.")
@JSON
def measure(
    artifact: str,
    source: str,
    suite: str | None,
    method: str | None,
    name: str | None,
    output: Path | None,
    force: bool,
    store_folder: Path | None,
    overrides: tuple[str, ...],
    quick: bool,
    as_json: bool,
) -> int:
    """Audit and measure ARTIFACT, quantized elsewhere, against SOURCE, and write its card.

    ARTIFACT is a folder with compressed-tensors, AWQ or GPTQ weights, which are taken as they are.
    Writes a recipe that says what it is, and runs it; after a stop, `quantize run` on the recipe
    goes on.
    """
    if quick:
        overrides = (*overrides, "evaluate.quick=true")
    with handle_signals():
        from quantize.adopting import Request, write_recipe
        from quantize.session import Session

        recipe = write_recipe(Request(artifact, source, suite, method, name, output, force))
        if not as_json:
            click.echo(f"wrote {recipe}")
        session = Session.open(str(recipe), overrides, store_folder, online=True)
        return session.run(only=None, first=None, last=None, as_json=as_json, write=click.echo)


@click.command()
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


@click.command()
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


@click.command()
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


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from quantize.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


@click.command()
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
