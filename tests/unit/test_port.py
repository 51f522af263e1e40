"""A port is held for one run; its server may bind it, nobody else gets it."""

from __future__ import annotations

import contextlib
import socket

import pytest
from child_process import helper

from quantize.measure.port import held_port

SERVER = """
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(sys.argv[2]))
try:
    server.bind(("127.0.0.1", int(sys.argv[1])))
    server.listen()
except OSError:
    print("taken", flush=True)
    sys.exit()
print("listens", flush=True)
server.accept()[0].sendall(b"mine")
"""


def test_a_server_that_is_told_the_port_gets_the_connections() -> None:
    with held_port() as port, helper(SERVER, port, 1) as server:
        assert server.read() == "listens"
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.recv(4) == b"mine"


def test_a_program_that_does_not_share_cannot_take_it() -> None:
    with held_port() as port, helper(SERVER, port, 0) as server:
        assert server.read() == "taken"


def test_no_two_runs_hold_the_same() -> None:
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(held_port()) for _ in range(500)]
    assert len(set(ports)) == 500


def test_nobody_is_answered_before_the_server_listens() -> None:
    with held_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
