"""What the commands do, without printing: recipe → resolved → plan → run folder → outcome."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.environments import (
    Environments,
    accelerator,
    cache_folder,
)
from quantize.errors import Interrupted, QuantizeError, ResourceError
from quantize.execute import Outcome, execute, places, select
from quantize.plan import Plan
from quantize.planner import plan, with_stale, with_status
from quantize.preflight import preflight
from quantize.process import withhold
from quantize.progress import BarView, LineView, Progress, View
from quantize.protocol import write_json
from quantize.recipe_file import load_recipe
from quantize.resolve import PLAN_HASH_LIMIT_BYTES, resolve
from quantize.resources import find_recipe
from quantize.runner import Runner
from quantize.stages.base import Resolved
from quantize.store import Artifact, Store

Write = Callable[[str], None]

HASH_REPORT_SECONDS = 3.0


def open_store(folder: Path | None) -> Store:
    """The store at `folder`, or the user's own."""
    return Store((folder or cache_folder() / "store").absolute())


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
        """Read everything that the plan depends on; nothing is written but a cache of hashes."""
        path = find_recipe(recipe)
        parsed = load_recipe(path, overrides)
        withhold(parsed.publish.secret_variables)
        here = accelerator()
        resolved = resolve(
            parsed,
            path,
            here,
            online=online,
            cache_path=cache_folder() / "hashes.json",
            hash_limit_bytes=None if online else PLAN_HASH_LIMIT_BYTES,
            on_hashed=_report_hashing(),
        )
        own = {str(k): Path(v.python).expanduser() for k, v in parsed.environments.items()}
        environments = Environments(here, cache_folder(), own)
        store = open_store(store_folder)
        made = with_status(plan(resolved, environments.lock_digest), store)
        made = with_stale(made, store, resolved)
        return cls(resolved, environments, store, made)

    def run(
        self, *, only: str | None, first: str | None, last: str | None, as_json: bool, write: Write
    ) -> int:
        """Run the selected stages; `result.json` and the end of the terminal say what became."""
        selected = select(self.plan, only, first, last)
        started = time.monotonic()
        folder = self._run_folder()
        progress = Progress(choose_view(as_json, write), folder / "status.json")
        runner = Runner(self.environments, folder / "logs", progress)
        outcome = Outcome()
        try:
            if not as_json:
                for note in self.plan.notes:
                    progress.note(f"note: {note}")
            preflight(self.resolved, self.store.root, self._kinds_to_run(selected))
            self.environments.check_overrides()
            execute(self.plan, self.resolved, self.store, runner, selected, outcome)
        except BaseException as error:
            progress.finish("interrupted" if isinstance(error, Interrupted) else "failed")
            self._finish(folder, outcome, runner, started, error, as_json, write)
            raise
        progress.finish("done")
        self._finish(folder, outcome, runner, started, None, as_json, write)
        return 0

    def artifacts_until(self, last: str, *, as_json: bool) -> dict[str, Artifact]:
        """Run what is missing up to a stage, as :meth:`run` does; artifacts by their stage's id."""

        def unsaid(_line: str) -> None:
            """The caller has more to say than that stages ran."""

        selected = select(self.plan, None, None, last)
        self.run(only=None, first=None, last=last, as_json=as_json, write=unsaid)
        found = {
            entry.id: self.store.get(entry.kind, entry.key)
            for entry in self.plan.stages
            if entry.id in selected and entry.key is not None
        }
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def _kinds_to_run(self, selected: Sequence[str]) -> set[str]:
        """Kinds and ids of the stages that this run will do something for, as far as is known."""
        todo = [e for e in self.plan.stages if e.id in selected and e.status != "done"]
        return {e.kind for e in todo} | {e.id for e in todo}

    def _run_folder(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        unique = f"{time.time_ns() % 10**9:09d}"  # a sweep starts many in one second
        folder = self.store.root / ".runs" / f"{self.plan.recipe_name}-{stamp}-{unique}"
        try:
            (folder / "logs").mkdir(parents=True)
        except OSError as error:
            raise ResourceError(
                f"cannot write to the store: {error}", "name another place with --store"
            ) from error
        return folder

    def _finish(
        self,
        folder: Path,
        outcome: Outcome,
        runner: Runner,
        started: float,
        error: BaseException | None,
        as_json: bool,
        write: Write,
    ) -> None:
        """Write `result.json`; show the table (also after a failed margin)."""
        from quantize.report.summary import summary_json

        seconds = time.monotonic() - started
        tools = sum(runner.tool_seconds.values())
        where = places(outcome, folder)
        failed = error if isinstance(error, QuantizeError) else None
        result: dict[str, Any] = {
            "recipe": self.plan.recipe_name,
            "exit_code": failed.exit_code if failed else (0 if error is None else 1),
            "seconds": {
                "total": round(seconds, 3),
                "tools": {name: round(value, 3) for name, value in runner.tool_seconds.items()},
                "own": round(seconds - tools, 3),
            },
            "stages": [asdict(stage) for stage in outcome.stages],
            "places": where,
        }
        if error is not None:
            result["error"] = {
                "kind": type(error).__name__,
                "message": str(error),
                "hint": failed.hint if failed else "",
            }
        if "card" in outcome.artifacts:
            result["summary"] = summary_json(outcome.artifacts["card"].json("record.json"), where)
        write_json(folder / "result.json", result)
        if as_json:
            import json

            write(json.dumps(result, indent=1, ensure_ascii=False))
        else:
            self._show(outcome, where, result, write)

    def _show(
        self, outcome: Outcome, where: dict[str, str], result: dict[str, Any], write: Write
    ) -> None:
        from quantize.report.summary import places_text, summary_table
        from quantize.report.tables import render

        if "card" in outcome.artifacts:
            record = outcome.artifacts["card"].json("record.json")
            write(render(summary_table(record)))
        write(places_text(where))
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


def _report_hashing() -> Callable[[int, int], None]:
    """Say how far the hashing of a large local checkpoint is; small ones pass in silence."""
    said = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= HASH_REPORT_SECONDS:
            said = time.monotonic()
            print(
                f"hashing the checkpoint: {done / 1e9:.0f} of {total / 1e9:.0f} GB", file=sys.stderr
            )

    return report


def choose_view(as_json: bool, write: Write) -> View:
    """Bars where a person looks on, lines in a log; with --json standard output stays clean."""
    if sys.stderr.isatty() and not as_json:
        from rich.console import Console

        return BarView(Console(stderr=True))

    def to_stderr(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(line, file=sys.stderr, flush=True)

    return LineView(to_stderr)
