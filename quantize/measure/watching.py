"""Finds a server that hangs while it is asked, and ends it; who waits for an answer is freed."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from quantize.liveness import Patience, Watch, end_hung
from quantize.measure.client import Client
from quantize.process import Process

LOOK_SECONDS = 2.0
UNHEALTHY_SECONDS = 180.0
"""Without an answer to anything, /health included, although the server's process lives."""


class ServerWatch:
    """Inside the block a thread watches; what hangs is killed, and `hung` of the process says why.

    Progress is an answer. While none is waited for there is nothing to be late with, but the server
    must still say that it is healthy. A request that is waited for when the server dies fails, and
    :meth:`quantize.runner.Runner.blaming` makes the one error of both.
    """

    def __init__(
        self,
        process: Process,
        client: Client,
        what: str,
        patience: Patience,
        unhealthy_seconds: float = UNHEALTHY_SECONDS,
    ) -> None:
        self._process, self._client, self._what = process, client, what
        self._watch = Watch([process], patience)
        self._unhealthy_seconds = unhealthy_seconds
        self._look_seconds = min(LOOK_SECONDS, patience.idle_seconds / 5, unhealthy_seconds / 5)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._over.set()

    @property
    def peak_bytes(self) -> int:
        """The most memory that the server's processes held together."""
        return self._watch.vitals.peak_bytes

    def _run(self) -> None:
        answered, healthy = self._client.answered, time.monotonic()
        while not self._over.wait(self._look_seconds) and self._process.poll() is None:
            if self._client.answered != answered or not self._client.waiting:
                self._watch.progressed()
            if self._client.answered != answered or self._client.healthy():
                healthy = time.monotonic()
            answered = self._client.answered
            why = self._watch.look()
            if (silent := time.monotonic() - healthy) > self._unhealthy_seconds:
                why = why or f"it has not answered /health for {silent:.0f} s"
            if why is not None and not self._over.is_set():
                end_hung(self._process, self._what, why)
                return
