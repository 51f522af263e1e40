"""The command: ``quantize`` and ``python -m quantize``."""

import os
import signal
import sys
from types import FrameType


def start() -> None:
    """Run the command line; a signal before and after what handles it has a code of ours, too."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_at_once)
    from quantize.cli import main

    main()


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """Nothing has begun, and the code is 75; or a run's result is written, and it has the code."""
    exit_code = getattr(sys.modules.get("quantize.stop"), "exit_code", None)
    os._exit(75 if exit_code is None else exit_code())


if __name__ == "__main__":
    start()
