"""Servers behind one small protocol: command line, environment, dialect, health, log patterns."""

from __future__ import annotations

from typing import cast

from quantize.machine import cpu_has
from quantize.servers import llamacpp, ollama, sglang, tgi, url, vllm
from quantize.servers.base import Server
from quantize.servers.support import AVX512_ON_CPU, LABELS, why_not

SERVERS: dict[str, Server] = {
    "vllm": cast(Server, vllm),
    "llamacpp": cast(Server, llamacpp),
    "url": cast(Server, url),
    "sglang": cast(Server, sglang),
    "tgi": cast(Server, tgi),
    "ollama": cast(Server, ollama),
}


def cannot_serve(server: str, form: str, scheme: str, accelerator: str) -> str | None:
    """Why a server does not take this format and scheme on this machine, or None."""
    if (why := why_not(server, form, scheme, accelerator)) is not None:
        return why
    if accelerator == "cpu" and (server, scheme) in AVX512_ON_CPU and not cpu_has("avx512f"):
        return (
            f"{LABELS[server]}'s CPU backend needs AVX-512 for 4-bit weights, and this processor "
            "has none"
        )
    return None
