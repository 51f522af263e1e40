"""`serve.engine: url` against a real vLLM that somebody else has started, with a key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.resources import shipped_root
from tests.end_to_end.conftest import Work
from tests.end_to_end.own_vllm import vllm

pytestmark = pytest.mark.end_to_end

KEY = "open-sesame"


@pytest.fixture(scope="module")
def endpoint(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The shipped checkpoint in BF16, under the name tiny; both sides of the comparison ask it."""
    model = shipped_root() / "examples" / "tiny_llama" / "instruct"
    limits = ("--max-logprobs", "20", "--max-model-len", "1024", "--max-num-seqs", "16")
    own = ("--served-model-name", "tiny", "--api-key", KEY, "--generation-config", "vllm")
    log = tmp_path_factory.mktemp("endpoint") / "log"
    with vllm(environment_python("vllm"), model, log, *limits, *own) as address:
        yield address


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
