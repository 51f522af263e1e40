"""What the commands do, without printing: recipe → resolved → plan → run folder → outcome."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize import __version__, stop
from quantize.checklist import Situation, preflight, survey
from quantize.environments import (
    Environments,
    accelerator,
    cache_folder,
)
from quantize.errors import Interrupted, ResourceError, TransientError
from quantize.execute import Outcome, execute, places, select
from quantize.findings import Faults, raise_findings
from quantize.gpu_processes import gpu_processes, leftovers
from quantize.hash_cache import HashCache
from quantize.in_use import announced
from quantize.metrics_file import check_name, write_metrics
from quantize.plan import Plan
from quantize.planner import plan, with_stale, with_status
from quantize.process import withhold
from quantize.progress import BarView, LineView, Progress, View
from quantize.protocol import write_json
from quantize.recipe_file import load_recipe
from quantize.refusals import refusals
from quantize.resolve import PLAN_HASH_LIMIT_BYTES, resolve
from quantize.resources import find_recipe
from quantize.runner import Runner
from quantize.stages.base import Resolved
from quantize.status import Status, describe, exit_code_of
from quantize.store import Artifact, Store

Write = Callable[[str], None]

HASH_REPORT_SECONDS = 3.0


def open_store(folder: Path | None) -> Store:
    """The store at `folder`, or the user's own; what it hashes is remembered with the rest."""
    hashes = HashCache(
        cache_folder() / "artifact-hashes.json", on_hashed=_report_hashing("finished artifacts")
    )
    return Store((folder or cache_folder() / "store").absolute(), hashes)


@dataclass(frozen=True)
class Reports:
    """Where a run says how it is beside its own folder: files of the user's choice."""

    status: Path | None = None
    metrics: Path | None = None

    @classmethod
    def of(cls, status: Path | None, metrics: Path | None) -> Reports:
        """From the command line; relative paths start where that was typed."""
        if metrics is not None:
            check_name(metrics)
        return cls(status and status.absolute(), metrics and metrics.absolute())

    def write_metrics(self, status: dict[str, Any]) -> None:
        """The textfile for Prometheus, if one is asked for."""
        if self.metrics is not None:
            write_metrics(self.metrics, status)


NO_REPORTS = Reports()


@dataclass(frozen=True)
class _Running:
    """One run that has begun."""

    folder: Path
    status: Status
    runner: Runner
    outcome: Outcome
    as_json: bool
    started: float  # monotonic


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, read; as far as it is there, where faults are kept."""

    resolved: Resolved
    environments: Environments
    store: Store

    @classmethod
    def read(
        cls,
        recipe: str,
        overrides: Sequence[str],
        store_folder: Path | None,
        *,
        online: bool,
        faults: Faults,
    ) -> Inputs:
        """Nothing is written but a cache of hashes. A UsageError for the recipe itself."""
        path = find_recipe(recipe)
        parsed = load_recipe(path, overrides)
        withhold(parsed.publish.secret_variables | parsed.serve.secret_variables)
        here = accelerator()
        resolved = resolve(
            parsed,
            path,
            here,
            online=online,
            cache_path=cache_folder() / "hashes.json",
            hash_limit_bytes=None if online else PLAN_HASH_LIMIT_BYTES,
            on_hashed=_report_hashing("the checkpoint"),
            faults=faults,
        )
        own = {str(k): Path(v.python).expanduser() for k, v in parsed.environments.items()}
        return cls(resolved, Environments(here, cache_folder(), own), open_store(store_folder))


def whole_situation(read: Inputs, faults: Faults, *, online: bool) -> tuple[Situation, Plan]:
    """For the checks of all stages, and the plan; a Hub that did not answer is not asked again."""
    made = plan(read.resolved, read.environments.lock_digest)
    asks = online and not any(isinstance(error, TransientError) for error in faults.errors)
    wanted = tuple(name for entry in made.stages for name in entry.environments)
    now = Situation(
        read.resolved,
        read.store.root,
        online=asks,
        environments=read.environments,
        wanted=wanted,
    )
    return now, made


@dataclass
class Session:
    """One recipe on one machine with one store."""

    resolved: Resolved
    environments: Environments
    store: Store
    plan: Plan

    @classmethod
    def open(
        cls, recipe: str, overrides: Sequence[str], store_folder: Path | None, *, online: bool
    ) -> Session:
        """Read everything that the plan depends on; nothing is written but a cache of hashes.

        Where something is missing and a run was to follow (`online`), what else would end it is
        said with it.
        """
        faults = Faults()
        read = Inputs.read(recipe, overrides, store_folder, online=online, faults=faults)
        resolved, environments, store = read.resolved, read.environments, read.store
        if faults.errors and online:
            checked = survey(whole_situation(read, faults, online=online)[0])
            others = [finding for one in checked for finding in one.told.findings]
            raise_findings([*faults.findings, *others] if others else ())
        faults.raise_all()
        made = with_status(plan(resolved, environments.lock_digest), store)
        made = with_stale(made, store, resolved)
        return cls(resolved, environments, store, made)

    def run(
        self,
        *,
        only: str | None,
        first: str | None,
        last: str | None,
        as_json: bool,
        write: Write,
        reports: Reports = NO_REPORTS,
    ) -> int:
        """Run the selected stages; `result.json` and the end of the terminal say what became."""
        selected = select(self.plan, only, first, last)
        with stop.held():  # between the end of the work and the last word no signal is lost
            running = self._begin(reports, as_json, write)
            try:
                with stop.interruptible():
                    self._work(running, selected)
            except BaseException as error:
                self._finish(running, error, write)
                raise
            self._finish(running, None, write)
        return 0

    def _begin(self, reports: Reports, as_json: bool, write: Write) -> _Running:
        """Run folder, status and runner; and what is written if the end must be by force."""
        with refusals("", self.store.root):
            folder = self._run_folder()
            status = self._status(folder, reports)
            status.start()
        progress = Progress(choose_view(as_json, write), status)
        runner = Runner(self.environments, folder / "logs", progress)
        running = _Running(folder, status, runner, Outcome(), as_json, time.monotonic())

        def last_words(error: Interrupted) -> None:
            result = self._result(running, error)
            status.end(error, result)
            write_json(folder / "result.json", result)

        stop.on_forced_end(last_words)
        return running

    def _status(self, folder: Path, reports: Reports) -> Status:
        recipe = self.resolved.recipe
        return Status(
            [folder / "status.json", *([reports.status] if reports.status else [])],
            {"recipe": recipe.name, "quantize": __version__, "run": str(folder)},
            price_per_hour=recipe.machine.price_per_hour,
            gpu=self.resolved.accelerator == "cuda",
            also=reports.write_metrics,
        )

    def _work(self, running: _Running, selected: Sequence[str]) -> None:
        progress = running.runner.progress
        if not running.as_json:
            for note in self.plan.notes:
                progress.note(f"note: {note}")
        if self.resolved.accelerator == "cuda":
            for line in leftovers(gpu_processes(), self.environments.cache / "environments"):
                progress.note(line)
        with refusals("", self.store.root), self._announced(running.folder, progress):
            self._preflight(selected, progress, quiet=running.as_json)
            execute(self.plan, self.resolved, self.store, running.runner, selected, running.outcome)

    def _preflight(self, selected: Sequence[str], progress: Progress, *, quiet: bool) -> None:
        """Every check of what this run will do; one error with all findings."""
        entries = [e for e in self.plan.stages if e.id in selected and e.status != "done"]
        checked = preflight(
            self.resolved,
            self.store.root,
            {entry.kind for entry in entries} | {entry.id for entry in entries},
            environments=self.environments,
            wanted=[name for entry in entries for name in entry.environments],
        )
        for note in (note for one in checked for note in one.told.notes if not quiet):
            progress.note(f"note: {note}")

    def artifacts_until(self, last: str, *, as_json: bool) -> dict[str, Artifact]:
        """Run what is missing up to a stage, as :meth:`run` does; artifacts by their stage's id."""

        def unsaid(_line: str) -> None:
            """The caller has more to say than that stages ran."""

        selected = select(self.plan, None, None, last)
        self.run(only=None, first=None, last=last, as_json=as_json, write=unsaid)
        stop.go_on()
        found = {
            entry.id: self.store.get(entry.kind, entry.key)
            for entry in self.plan.stages
            if entry.id in selected and entry.key is not None
        }
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def _announced(
        self, folder: Path, progress: Progress
    ) -> contextlib.AbstractContextManager[None]:
        """While it lasts, no garbage collection takes what this run has made or will read."""

        def on_wait() -> None:
            progress.note("waiting for a garbage collection of the store")

        used = [(entry.kind, entry.key) for entry in self.plan.stages if entry.key is not None]
        return announced(self.store.root, used, folder, on_wait)

    def _run_folder(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        unique = secrets.token_hex(4)  # a sweep starts many in one second
        folder = self.store.root / ".runs" / f"{self.plan.recipe_name}-{stamp}-{unique}"
        try:
            (folder / "logs").mkdir(parents=True)
        except OSError as error:
            raise ResourceError(
                f"cannot write to the store: {error}", "name another place with --store"
            ) from error
        return folder

    def _finish(self, running: _Running, error: BaseException | None, write: Write) -> None:
        """Write `result.json`; show the table (also after a failed margin)."""
        stop.decide(exit_code_of(error))
        running.runner.progress.close()
        result = self._result(running, error)
        running.status.end(error, result)
        try:
            write_json(running.folder / "result.json", result)
        except OSError as refused:  # the disk is full: the terminal says what became of the run
            place = running.folder / "result.json"
            print(f"cannot write {place}: {refused.strerror}", file=sys.stderr)
        stop.said()
        try:
            self._show(running, result, write)
        except BrokenPipeError:  # nobody reads on, which does not change what became of the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _result(self, running: _Running, error: BaseException | None) -> dict[str, Any]:
        """What `result.json` says."""
        from quantize.report.summary import summary_json

        seconds = time.monotonic() - running.started
        spent = running.runner.tool_seconds
        where = places(running.outcome, running.folder)
        status = running.status.json()
        known = ("quantize", "host", "pid", "started", "memory", "cost", "stage")
        result: dict[str, Any] = {
            "recipe": self.plan.recipe_name,
            "exit_code": exit_code_of(error),
            **{name: status[name] for name in known if name in status},
            "seconds": {
                "total": round(seconds, 3),
                "tools": {name: round(value, 3) for name, value in spent.items()},
                "own": round(seconds - sum(spent.values()), 3),
            },
            "stages": [asdict(stage) for stage in running.outcome.stages],
            "places": where,
        }
        if error is not None:
            result["error"] = describe(error)
        if "card" in running.outcome.artifacts:
            record = running.outcome.artifacts["card"].json("record.json")
            result["summary"] = summary_json(record, where)
        return result

    def _show(self, running: _Running, result: dict[str, Any], write: Write) -> None:
        from quantize.report.summary import places_text, summary_table
        from quantize.report.tables import render

        if running.as_json:
            write(json.dumps(result, indent=1))
            return
        outcome = running.outcome
        if "card" in outcome.artifacts:
            record = outcome.artifacts["card"].json("record.json")
            write(render(summary_table(record)))
        write(places_text(result["places"]))
        if "error" in result:
            return
        hits = sum(1 for stage in outcome.stages if stage.state == "hit")
        if not outcome.ran:
            write(f"nothing to do: all {hits} stages were done already")
        else:
            total, own = result["seconds"]["total"], result["seconds"]["own"]
            write(
                f"done in {total:.0f} s ({own:.1f} s of it our own): "
                f"{len(outcome.ran)} stages ran, {hits} were done already"
            )


def _report_hashing(what: str) -> Callable[[int, int], None]:
    """Say how far the hashing of large files is; small ones pass in silence."""
    said = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= HASH_REPORT_SECONDS:
            said = time.monotonic()
            print(f"hashing {what}: {done / 1e9:.0f} of {total / 1e9:.0f} GB", file=sys.stderr)

    return report


def choose_view(as_json: bool, write: Write) -> View:
    """Bars where a person looks on, lines in a log; with --json standard output stays clean."""
    if sys.stderr.isatty() and not as_json:
        from rich.console import Console

        return BarView(Console(stderr=True))

    def to_stderr(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return LineView(to_stderr)
