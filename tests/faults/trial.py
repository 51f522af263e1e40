"""One schedule from its start to its end, and what must hold at every moment of it."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from tests.faults.bench import MESSAGE, SCENARIOS, TAG, TOKEN, Bench, Run
from tests.faults.leaks import leaks
from tests.faults.schedules import (
    CLIENT_TIMEOUT_SECONDS,
    RETRY_AFTER_SECONDS,
    Planned,
    Schedule,
)
from tests.hub_server import Seen
from tests.hub_server.repos import Repo, Tree

ENDS = {"expired": {5}, "moved": {6}, "quota": {4}, "damage": {1, 3, 6}, "lie": {1, 3, 6}}
"""Exit codes that a run under a fault may have, besides 0 and 75 (run the same command again).

What comes of a Hub that stores or tells wrong bytes has no one name."""


class Broken(AssertionError):
    """What must hold does not."""


def happy_path(bench: Bench, name: str) -> Sequence[Seen]:
    """The requests of a push without faults, which must end well."""
    bench.begin(name)
    run = bench.push(bench.second, SCENARIOS[name])
    _expect(run.status == 0, f"a push without faults ends with {run.status}: {run.result}")
    return run.requests


def run_schedule(bench: Bench, schedule: Schedule) -> int:
    """Raise Broken when something does not hold; the number of requests otherwise."""
    bench.begin(schedule.scenario)
    trial = Trial(bench, schedule)
    bench.server.observers[:] = [trial.watch]
    try:
        for planned in (*schedule.runs, ()):
            trial.run(planned)
    finally:
        bench.server.observers.clear()
    trial.check_result()
    trial.check_leaks()
    return len(trial.requests)


class Trial:
    """The state of one schedule's runs."""

    def __init__(self, bench: Bench, schedule: Schedule) -> None:
        self.bench, self.schedule = bench, schedule
        self.scenario = SCENARIOS[schedule.scenario]
        self.requests: list[Seen] = []
        self.problem = ""  # what was seen between two requests
        self.complete: frozenset[str] = frozenset()  # objects that earlier runs brought

    def run(self, planned: Sequence[Planned]) -> None:
        """One push under faults; the server's state stays, its troubles end with the run."""
        bench = self.bench
        bench.server.faults[:] = [bench.fault(each) for each in planned]
        late = any(each.kind == "late" for each in planned)
        run = bench.push(
            bench.second, self.scenario, timeout=CLIENT_TIMEOUT_SECONDS if late else None
        )
        self.requests += run.requests
        _expect(not self.problem, self.problem)
        self.check_end(planned, run)
        self.check_bytes(planned, run)
        repo = bench.repo()
        self.complete = frozenset(repo.objects) if repo else frozenset()
        bench.server.hub.expired.clear()
        bench.server.hub.limits.private_bytes = {}

    def watch(self, request: str) -> None:
        """After every request: main, pull requests and tags hold a whole version."""
        repo = self.bench.repo()
        if repo is None or self.problem:
            return
        if "damage" in self.schedule.kinds and "/commit/" in request:
            return  # the Hub itself stores other bytes than it was sent
        if "damage" in self.schedule.kinds and self._is_damaged(repo):
            return
        wrong = [
            name
            for name, commit in (repo.branches | repo.pull_heads).items()
            if not (self._is_old(repo.commits[commit]) or self._is_new(repo.commits[commit]))
        ]
        wrong += [
            tag for tag, commit in repo.tags.items() if not self._is_new(repo.commits[commit])
        ]
        if self.scenario.pull_request and not self._is_old(repo.tree("main")):
            wrong.append("main, which was to stay,")
        if wrong:
            self.problem = f"{wrong[0]} is no whole version after {request}"

    def _is_damaged(self, repo: Repo) -> bool:
        """Whether a commit of ours may be there that the Hub stored with other bytes."""
        return repo.messages.count(MESSAGE) > self.scenario.with_first

    def _is_old(self, tree: Tree) -> bool:
        if self.scenario.with_first:
            return self.bench.first.is_in(tree)
        return set(tree) <= {".gitattributes", "theirs.txt"}

    def _is_new(self, tree: Tree) -> bool:
        return self.bench.second.is_in(tree)

    def _published(self) -> list[str]:
        """The refs that hold the new version."""
        repo = self.bench.repo()
        if repo is None:
            return []
        heads = repo.pull_heads if self.scenario.pull_request else {"main": repo.branches["main"]}
        return [ref for ref, commit in heads.items() if self._is_new(repo.commits[commit])]

    def check_end(self, planned: Sequence[Planned], run: Run) -> None:
        kinds = {each.kind for each in planned}
        if run.status == -signal.SIGKILL:
            _expect(any(kind.startswith("kill") for kind in kinds), "nobody killed it")
            return
        _expect(bool(run.result), f"it crashed with {run.status}")
        allowed = {0, 75}.union(*(ENDS.get(kind, set()) for kind in kinds)) if planned else {0}
        _expect(run.status in allowed, f"ended with {run.status}: {run.result.get('text')}")
        if run.status == 0:
            _expect(bool(self._published()), "it says that it is done, and it is not")
        if {"503", "429"} & kinds and len(planned) == 1:
            waits = run.result["waits"]
            waited = max(waits, default=0)
            _expect(waited >= RETRY_AFTER_SECONDS, f"Retry-After was not waited for: {waits}")

    def check_bytes(self, planned: Sequence[Planned], run: Run) -> None:
        """Complete objects are not sent again; others once, and once more for a fault that hit."""
        repo = self.bench.repo()
        for sha, sent in run.sent().items():
            _expect(sha not in self.complete, f"object {sha[:8]} was complete and is sent again")
            size = len(repo.objects[sha]) if repo and sha in repo.objects else sent
            _expect(sent <= size * (1 + len(planned)), f"{sent} bytes for an object of {size}")

    def check_result(self) -> None:
        repo = self.bench.repo()
        _expect(repo is not None, "there is no repository")
        assert repo is not None
        closed = {pull.ref for pull in repo.pulls.values() if pull.status == "closed"}
        published = [ref for ref in self._published() if ref not in closed]
        _expect(len(published) == 1, f"the new version is at {published or 'no ref'}")
        self._check_commits(repo)
        if self.scenario.pull_request:
            others = set(repo.pull_heads) - {published[0]}
            late = "late" in self.schedule.kinds  # one more may have been opened behind our back
            _expect(others == closed and (late or not closed), f"pull requests: {repo.pulls}")
        if "tag" in self.scenario.target:
            _expect(repo.tags.keys() == {TAG}, f"tags: {sorted(repo.tags)}")
            [collection] = self.bench.server.hub.collections.values()
            _expect(len(collection.items) == 1, f"in the collection: {collection.items}")

    def _check_commits(self, repo: Repo) -> None:
        ours = repo.messages.count(MESSAGE) - self.scenario.with_first
        damaged = sum(each.kind == "damage" for run in self.schedule.runs for each in run)
        closed = sum(pull.status == "closed" for pull in repo.pulls.values())
        _expect(1 <= ours <= 1 + damaged + closed, f"{ours} commits instead of one")
        heads = {**repo.branches, **repo.pull_heads}
        theirs = any("theirs.txt" in repo.commits[commit] for commit in heads.values())
        _expect(theirs == ("faster" in repo.messages), "a file of somebody else's was lost")

    def check_leaks(self) -> None:
        """No token in what was printed, logged or sent; no path of this machine was sent."""
        folder = self.bench.folder
        said = b"".join((folder / name).read_bytes() for name in ("output.txt", "result.json"))
        _expect(not leaks(said, TOKEN), "the token was printed")
        for seen in self.requests:
            sent = seen.searchable()
            _expect(not leaks(sent, TOKEN), f"the token was sent with {seen.method} {seen.path}")
            _expect(not leaks(sent, str(folder)), f"a path was sent with {seen.path}")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise Broken(problem)
