"""Servers behind one small protocol: command line, environment, health, log patterns."""

from __future__ import annotations

from typing import cast

from quantize.servers import vllm
from quantize.servers.base import Server

SERVERS: dict[str, Server] = {"vllm": cast(Server, vllm)}
