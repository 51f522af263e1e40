"""`serve.engine: url` against a real vLLM that somebody else has started, with a key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quantize.resources import shipped_root
from tests.end_to_end.conftest import Work, environment

pytestmark = pytest.mark.end_to_end

KEY = "open-sesame"
SECONDS = 600


@pytest.fixture(scope="module")
def endpoint(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The shipped checkpoint in BF16, under the name tiny; both sides of the comparison ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = shipped_root() / "examples" / "tiny_llama" / "instruct"
    command = [str(environment_python("vllm")), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "tiny", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-logprobs", "20"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--generation-config", "vllm", "--api-key", KEY]
    base, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {KEY}"}
    log = tmp_path_factory.mktemp("endpoint") / "log"
    with log.open("wb") as output:
        more = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        process = subprocess.Popen(command, env=environment(more), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + SECONDS
            while not _lists(f"{base}/v1/models", headers):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(1)
            yield base
        finally:
            process.terminate()
            process.wait(60)


def _lists(address: str, headers: dict[str, str]) -> bool:
    try:
        return httpx.get(address, headers=headers, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_endpoints_are_measured(endpoint: str, work: Work) -> None:
    end = f"{{url: '{endpoint}/v1', model: tiny, api_key_variable: OF_THE_ENDPOINT}}"
    serve = f"serve={{engine: url, endpoints: {{baseline: {end}, candidate: {end}}}}}"
    result = work.run(
        "tiny-llama-fp8",
        *("--set", serve, "--set", "evaluate.noise=false", "--set", "evaluate.quick=true"),
        *("--until", "card"),
        env={"OF_THE_ENDPOINT": KEY},
    )
    record: dict[str, Any] = json.loads(Path(result["places"]["record"]).read_text())
    compare = record["compare"]
    assert compare["perplexity"]["ratio"] == pytest.approx(1, abs=1e-3)  # it is one model
    assert {task["name"] for task in compare["tasks"]} == {"valley_mc", "valley_qa"}
    server = record["candidate"]["server"]
    assert (server["name"], server["version"], server["command"]) == ("url", "0.32.0", [])
    missing = {entry["what"] for entry in record["candidate"]["not_measured"]}
    assert missing == {"latency and throughput", "special tokens in answers"}
    for path in Path(result["places"]["record"]).parent.rglob("*"):
        if path.is_file():
            assert endpoint.encode() not in path.read_bytes()
            assert KEY.encode() not in path.read_bytes()


def test_another_model_is_refused_before_the_work(endpoint: str, work: Work) -> None:
    end = f"{{url: '{endpoint}', model: other, api_key_variable: OF_THE_ENDPOINT}}"
    serve = f"serve={{engine: url, endpoints: {{baseline: {end}, candidate: {end}}}}}"
    done = work.quantize(
        *("run", "tiny-llama-fp8", "--store", str(work.store), "--set", serve),
        env={**os.environ, "OF_THE_ENDPOINT": KEY},
    )
    assert done.code == 4
    assert "the endpoint serves tiny, and not other" in done.err
