"""Commands on what a run made: report, verify, card, convert."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantize.cli.base import JSON, STORE
from quantize.errors import SourceError
from quantize.stop import handle_signals

STORED_FORMATS = ("compressed-tensors", "awq", "gptq")
"""As `quantize.artifact_formats.FORMATS`, which `--help` need not import."""


@click.command()
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


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT ARTIFACT...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the page of `quantize report` on them, too.",
)
@STORE
@JSON
def compare(
    artifacts: tuple[str, ...], output: Path | None, store_folder: Path | None, as_json: bool
) -> None:
    """Show results side by side: size, quality with intervals, verdicts, time and memory.

    ARTIFACT is a recipe whose card is in the store, a published folder, a run's folder, or a card's
    record.json: results of any engine and format. Says which of them should not be compared.
    """
    from quantize.report.tables import comparison_table, render
    from quantize.reporting import compare as compare_results
    from quantize.reporting import report as write_report
    from quantize.session import open_store

    store = open_store(store_folder)
    found = compare_results(artifacts, store)
    written = write_report(artifacts, output, None, store) if output is not None else None
    if as_json:
        said = found.json() | ({"report": str(written.page)} if written else {})
        click.echo(json.dumps(said, indent=1, ensure_ascii=False))
        return
    click.echo(render(comparison_table(found)), nl=False)
    for remark in found.remarks:
        click.echo(f"note: {remark}")
    if written is not None:
        click.echo(f"wrote {written.page}")


@click.command()
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


@click.command()
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


@click.command()
@click.argument("artifact")
@click.option(
    "--format",
    "name",
    required=True,
    type=click.Choice(STORED_FORMATS),
    help="How the weights are stored afterwards.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The folder  [default: ARTIFACT's name and the format]",
)
@click.option("--force", is_flag=True, help="Replace a checkpoint in OUTPUT.")
@STORE
@JSON
def convert(
    artifact: str,
    name: str,
    output: Path | None,
    force: bool,
    store_folder: Path | None,
    as_json: bool,
) -> None:
    """Write the quantized checkpoint ARTIFACT in another format, without quantizing it again.

    ARTIFACT is a folder (ours, AutoAWQ's, GPTQModel's), or a recipe whose result is in the store.
    Dequantized weights stay equal bit by bit; what the format cannot hold is refused.
    """
    with handle_signals():
        from dataclasses import asdict

        from quantize.converting import convert as write
        from quantize.converting import find_artifact
        from quantize.progress import Progress
        from quantize.session import choose_view, open_store

        found = find_artifact(artifact, open_store(store_folder))
        progress = Progress(choose_view(as_json, click.echo))

        def report(done: int, total: int) -> None:
            progress.step("repacking the weights", done / 1e9, total / 1e9, "GB")

        try:
            target, done = write(found, name, output, report, force=force)
        finally:
            progress.close()
    if as_json:
        click.echo(json.dumps({"folder": str(target), **asdict(done)}, indent=1))
    else:
        click.echo(f"wrote {target}: {done.modules} modules, {done.before} to {done.after}")
