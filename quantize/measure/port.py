"""A port for a server of ours, which no other run on this machine chooses while it is held."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A free port of 127.0.0.1, bound by this process, without listening, until the block is left.

    The kernel gives a bound port to nobody who asks for any free one, so two runs that start at the
    same time have two ports, and neither takes the other's server for its own. A server that is
    told the number may still bind it: both sockets have SO_REUSEADDR, and this one never listens
    (socket(7)). The hold ends with the process, however it ends.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
