"""Calibration data → token ids: an artifact of its own, so that every engine sees the same."""

from __future__ import annotations

from typing import Any

from quantize.adapter import tokenizer_folder
from quantize.checkpoint import model_folder
from quantize.process import hub_token
from quantize.stages.base import Resolved, StageContext

VERSION = 2  # 2: rows.jsonl


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """Tokenizers and data set readers come with llm-compressor."""
    return ("llmcompressor",)


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The data's content and how it is drawn and cut."""
    calibration = resolved.recipe.calibration
    assert calibration is not None, "the planner adds this stage only for a calibration block"
    return {
        "data": resolved.digests["calibration"],
        **calibration.model_dump(
            mode="json",
            include={"config", "split", "samples", "sequence_length", "packing", "seed"},
        ),
    }


def run(context: StageContext) -> None:
    """Run the worker; `tokens.npz`, `rows.jsonl` and `calibrate.json` are its output."""
    calibration = context.recipe.calibration
    assert calibration is not None
    path = context.resolved.paths.get("calibration")
    tokenizer = model_folder(context.inputs["fetch"])
    if "adapter" in context.inputs:  # rows look as they did in the fine-tune's training
        tokenizer = tokenizer_folder(context.inputs["adapter"]) or tokenizer
    body = calibration.model_dump(mode="json") | {
        "source": str(path) if path else calibration.source,
        "hub": path is None,
        "revision": context.resolved.commit("calibration"),
        "model": str(tokenizer),
        "output": str(context.files),
        "trust_remote_code": context.recipe.model.trust_remote_code is not None,
    }
    context.runner.worker(
        "llmcompressor",
        "calibrate",
        body,
        work=context.work,
        label="calibrate",
        env={
            "HF_MODULES_CACHE": str(context.work / "code"),  # of trusted code alone
            **(hub_token() if path is None else {"HF_HUB_OFFLINE": "1"}),
        },
    )
