"""vLLM's own serving benchmark against a running server.

Runs in the vllm environment, whose `vllm bench serve` is the field's reference for time to first
token and throughput; the community's CPU build has no `vllm` command, so its function is called.

Request body: `port`, `model` (served name), `tokenizer` (folder), `requests`, `concurrency`,
`input_tokens`, `output_tokens`, `seed`. Result body: the benchmark's own JSON, numbers only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm.benchmarks.serve import add_cli_args, main

from quantize.protocol import Events, Request, WorkerError, worker_main


def run(request: Request, events: Events) -> dict[str, Any]:
    """Send random prompts of fixed length, all at once but for the concurrency limit."""
    body = request.body
    events.progress("load", 0, body["requests"], "requests")
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    result = Path(request.work, "load.json")
    result.unlink(missing_ok=True)
    arguments = {
        "--port": body["port"],
        "--model": body["model"],
        "--tokenizer": body["tokenizer"],
        "--dataset-name": "random",
        "--random-input-len": body["input_tokens"],
        "--random-output-len": body["output_tokens"],
        "--num-prompts": body["requests"],
        "--max-concurrency": body["concurrency"],
        "--num-warmups": min(2, body["concurrency"]),
        "--seed": body["seed"],
        "--percentile-metrics": "ttft,tpot,itl",
        "--metric-percentiles": "50,99",
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    trusted = ["--trust-remote-code"] if body.get("trust_remote_code") else []
    flags = [*trusted, "--ignore-eos", "--save-result", "--disable-tqdm"]
    typed = [str(part) for pair in arguments.items() for part in pair]
    main(parser.parse_args(typed + flags))
    values = json.loads(result.read_text(encoding="utf-8"))
    if values["completed"] != body["requests"]:
        raise WorkerError(
            "ToolError", f"{values['completed']} of {body['requests']} load requests were answered"
        )
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    worker_main(run)
