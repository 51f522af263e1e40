"""The command: ``quantize`` and ``python -m quantize``."""

import os
import signal
from types import FrameType


def start() -> None:
    """Run the command line; a signal while that is still being imported ends with 75, too."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing_has_begun)
    from quantize.cli import main

    main()


def _nothing_has_begun(_number: int, _frame: FrameType | None) -> None:
    os._exit(75)


if __name__ == "__main__":
    start()
