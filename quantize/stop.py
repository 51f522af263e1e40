"""How a run stops when it is asked to: at a resumable point, and in bounded time.

The first signal (SIGINT, SIGTERM, SIGUSR1, SIGHUP)

- raises :class:`Interrupted` in the main thread, or, inside :class:`held`, at the end of that
  block, so that no file, process or result is left between two states;
- ends all children at the same time, so that their grace periods do not add up;
- sets a deadline: EXIT_SECONDS later the process is gone, whatever the main thread is stuck in. A
  thread watches over that: Python runs a handler only when the main thread comes back to it.

A second signal does not wait for the deadline. Both ends kill the children first. Once the result
is written (:func:`decide`, :func:`said`) a signal changes nothing any more: the process ends with
the result's code, if need be at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from quantize.errors import Interrupted
from quantize.supervise import KILL_AT_ONCE, PR_SET_CHILD_SUBREAPER, prctl

EXIT_SECONDS = 17.0
"""From the first signal to the end by force. With what that takes it is less than 20 s."""
GONE_SECONDS = 1.5
"""How long an end by force waits for the children to be gone, and then for the last words."""
TWICE_SECONDS = 0.2
"""A signal so soon after the first is the same one: `timeout` sends it to the process and to its
group, a terminal to a wrapper that passes it on, too."""
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _State:
    """What has been asked of this process; signals are a matter of processes, so there is one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing has been asked."""
        self.requested: int | None = None  # the first signal
        self.raised = False  # the main thread knows
        self.code: int | None = None  # of the result, once it is known
        self.depth = 0  # of `held` blocks
        self.children: set[int] = set()  # process ids of supervisors
        self.last_words: Callable[[Interrupted], None] | None = None  # none, or said
        self.collects_orphans = False


_state = _State()


def interrupted() -> Interrupted:
    """The error for the signal that came."""
    name = signal.Signals(_state.requested or signal.SIGTERM).name
    return Interrupted(
        f"stopped by {name}; what was finished is kept", "run the same command again to go on"
    )


def check() -> None:
    """Raise Interrupted if it was asked for; in loops, for a raise that somebody swallowed.

    Python swallows what is raised in a destructor or a callback of a C library.
    """
    if threading.current_thread() is threading.main_thread():
        _raise(again=True)


def _raise(*, again: bool = False) -> None:
    if _state.requested is None or _state.depth or _state.code is not None:
        return
    if again or not _state.raised:
        _state.raised = True
        raise interrupted()


def decide(code: int) -> None:
    """The result is known, and its exit code: no signal raises until :func:`go_on`."""
    _state.code = code


def said() -> None:
    """The result is written: an end by force has nothing to add to it."""
    _state.last_words = None


def go_on() -> None:
    """That result was a part of what the command is to do: signals count again, as do earlier."""
    _state.code = None
    check()


def exit_code() -> int:
    """Of a process that ends this moment."""
    if _state.code is None or _state.last_words is not None:
        return Interrupted.exit_code
    return _state.code


class held:
    """A block that a signal does not cut: Interrupted is raised at its end. For what is short."""

    def __enter__(self) -> None:
        _state.depth += 1

    def __exit__(self, *_: object) -> None:
        _state.depth -= 1
        _raise()


class interruptible:
    """Inside :class:`held`, a block in which signals raise at once; they wait again after it."""

    def __enter__(self) -> None:
        self._depth, _state.depth = _state.depth, 0
        try:
            _raise()
        except Interrupted:
            _state.depth = self._depth
            raise

    def __exit__(self, *_: object) -> None:
        _state.depth = self._depth


def add_child(pid: int) -> None:
    """A supervisor to be ended with the run; one that starts after the signal is ended at once."""
    _state.children.add(pid)
    if _state.requested is not None:
        _send(pid, signal.SIGTERM)


def remove_child(pid: int) -> None:
    """It has been waited for."""
    _state.children.discard(pid)


def children() -> frozenset[int]:
    """Supervisors that have not been waited for."""
    return frozenset(_state.children)


def collects_orphans() -> bool:
    """Whether processes below us that lose their parent become our children."""
    return _state.collects_orphans


def on_forced_end(last_words: Callable[[Interrupted], None]) -> None:
    """Called before an end by force, from another thread, with a second to write a file."""
    _state.last_words = last_words


class handle_signals:
    """Inside the block signals are handled as this module says; children do not outlive it."""

    def __enter__(self) -> None:
        _state.reset()
        _state.collects_orphans = prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._ours, self._kernels = socket.socketpair()
        self._kernels.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._kernels.fileno(), warn_on_full_buffer=False)
        # nohup ignores SIGHUP, and means it
        self._before: dict[int, Any] = {
            number: signal.signal(number, _on_signal)
            for number in NUMBERS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        self._watcher = threading.Thread(target=_watch, args=(self._ours,), daemon=True)
        self._watcher.start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        _state.depth += 1  # nothing raises from here on
        for pid in children():  # started in the moment in which the signal came
            _end(pid)
        if _state.collects_orphans:
            prctl(PR_SET_CHILD_SUBREAPER, 0)
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._kernels.close()  # the watcher reads its end
        self._watcher.join(1.0)
        self._ours.close()


def _on_signal(number: int, _frame: FrameType | None) -> None:
    """In the main thread, as soon as that runs Python code again."""
    _state.requested = _state.requested or number
    if number == signal.SIGHUP:
        _leave_terminal()
    _raise()


def _leave_terminal() -> None:
    """What is written to a terminal that is gone fails (EIO), and would be the run's failure."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            gone = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
            if gone:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, descriptor)
                os.close(null)


def _watch(ours: socket.socket) -> None:
    """Signals as the kernel delivers them, a byte each; until the other end is closed."""
    while number := _next(ours):
        if number not in NUMBERS:
            continue
        _state.requested = _state.requested or number
        for pid in children():
            _send(pid, signal.SIGTERM)
        ours.settimeout(EXIT_SECONDS)
        first = time.monotonic()
        with contextlib.suppress(TimeoutError):
            while number := _next(ours):
                if number in NUMBERS and time.monotonic() - first > TWICE_SECONDS:
                    break
            if number is None:
                return
        end_by_force()


def _next(ours: socket.socket) -> int | None:
    block = ours.recv(1)
    return block[0] if block else None


def end_by_force() -> None:
    """Kill the children, say the last words, and end without any more Python."""
    for pid in children():
        _send(pid, KILL_AT_ONCE)
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline and not all(_is_over(pid) for pid in children()):
        time.sleep(0.01)
    code = exit_code()
    if _state.last_words is not None:
        words = threading.Thread(target=_state.last_words, args=(interrupted(),), daemon=True)
        words.start()
        words.join(GONE_SECONDS)  # the disk may be what hangs
    os._exit(code)


def _end(pid: int) -> None:
    _send(pid, signal.SIGTERM)
    deadline = time.monotonic() + EXIT_SECONDS
    while not _is_over(pid):
        if time.monotonic() > deadline:
            _send(pid, KILL_AT_ONCE)
        time.sleep(0.01)
    remove_child(pid)


def _is_over(pid: int) -> bool:
    """Whether a child has ended, without taking its exit code from who waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
