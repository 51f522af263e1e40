"""A vLLM that a test starts by itself, apart from the pipeline's own servers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from quantize.measure.port import held_port
from tests.end_to_end.conftest import environment

SECONDS = 600


@contextmanager
def vllm(python: Path, model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """The address of a server in BF16 on a free port, once it is ready."""
    with held_port() as port, log.open("wb") as output:
        address = f"http://127.0.0.1:{port}"
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--enforce-eager", *arguments]
        more = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        process = subprocess.Popen(command, env=environment(more), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + SECONDS
            while not _ready(address):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
