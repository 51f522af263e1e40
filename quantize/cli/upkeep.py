"""Commands on what lies in the cache: the tools' environments and the store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantize.cli.base import JSON, STORE
from quantize.errors import UsageError
from quantize.stop import handle_signals


@click.command()
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


@click.group()
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


@click.group()
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
