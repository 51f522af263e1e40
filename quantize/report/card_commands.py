"""Commands on a card that serve or load the checkpoint, and what of them was run when measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.artifact_formats import FORMATS
from quantize.report.results import Record
from quantize.servers.support import why_not
from quantize.servers.vllm_lora import adapter_options

SGLANG_NEW = "W4A16_ASYM"
"""SGLang reads the zero points of compressed-tensors since its pull request 25292, of 2026."""

PLACES = frozenset({"--lora-modules", "--tokenizer"})
"""Flags whose value is a folder: another one here than where it was measured."""


@dataclass(frozen=True)
class Command:
    """A command line, and the flags of it that the measurement did not use."""

    text: str
    not_run: tuple[str, ...]


def vllm_command(record: Record) -> Command:
    """`vllm serve` with the settings of the measurement that make sense elsewhere, quoted."""
    serve = record["recipe"]["serve"]
    options = [["--dtype", "bfloat16"]]
    if "max_model_len" in serve:
        options.append(["--max-model-len", str(serve["max_model_len"])])
    options.append(["--max-num-seqs", str(serve["max_num_seqs"])])
    options.append(["--gpu-memory-utilization", str(serve["gpu_memory_utilization"])])
    if serve["tensor_parallel_size"] > 1:
        options.append(["--tensor-parallel-size", str(serve["tensor_parallel_size"])])
    caching = "enable-prefix-caching"
    options.append([f"--{caching}" if serve["enable_prefix_caching"] else f"--no-{caching}"])
    options += _adapter_options(record)
    lines = [shlex.join(option) for option in options]
    if record["recipe"]["model"].get("trust_remote_code"):
        lines.append("--trust-remote-code")
    if serve["extra_args"]:
        lines.append(shlex.join(serve["extra_args"]))
    run: Sequence[str] = record.get("candidate", {}).get("server", {}).get("command", ())
    not_run = tuple(option[0] for option in options if not _was_run(option, run))
    text = " \\\n  ".join([f"vllm serve {shlex.quote(_model(record))}", *lines])
    return Command(_download(record) + text, not_run)


def _was_run(option: Sequence[str], run: Sequence[str]) -> bool:
    flag, *values = option
    if flag not in run:
        return False
    after = list(run).index(flag) + 1
    return flag in PLACES or list(run[after : after + len(values)]) == values


def _adapter_options(record: Record) -> list[list[str]]:
    """Flags for an adapter that is kept apart; requests name it as their model."""
    if "adapter" not in record:
        return []
    adapter, name = record["adapter"], f"{record['recipe']['name']}-adapter"
    options = adapter_options(name, _adapter(record), adapter["rank"], adapter["targets"])
    return options + ([["--tokenizer", _adapter(record)]] if adapter["tokenizer"] else [])


def sglang_command(record: Record) -> str:
    """SGLang's server; it reads the format from config.json."""
    parts = [f"python -m sglang.launch_server --model-path {shlex.quote(_model(record))}"]
    serve = record["recipe"]["serve"]
    if "max_model_len" in serve:
        parts.append(f"--context-length {serve['max_model_len']}")
    if "adapter" in record:
        name = f"{record['recipe']['name']}-adapter"
        parts.append(f"--enable-lora --lora-paths {shlex.quote(f'{name}={_adapter(record)}')}")
    return _download(record) + " \\\n  ".join(parts)


def sglang_caution(record: Record) -> str:
    """What of this checkpoint SGLang, or an older one, does not take; "" where it takes it."""
    quantize = record["recipe"]["quantize"]
    form = quantize.get("format", "compressed-tensors")
    schemes = [quantize["scheme"], *(part["scheme"] for part in quantize.get("overrides", ()))]
    for scheme in schemes:
        if (why := why_not("sglang", form, scheme, "cuda")) is not None:
            return f"It may refuse this model: {why}."
    if form == "compressed-tensors" and SGLANG_NEW in schemes:
        return "Versions from before the middle of 2026 refuse the zero points of this model."
    return ""


def transformers_code(record: Record) -> str:
    """A snippet that loads the checkpoint in transformers, with its adapter if that is apart."""
    apart = "adapter" in record
    own_tokenizer = apart and record["adapter"]["tokenizer"]
    tokenizer, model = _adapter(record) if own_tokenizer else _model(record), _model(record)
    lines = [
        *(["from peft import PeftModel"] if apart else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)})",
        f"{'base' if apart else 'model'} = "
        f'AutoModelForCausalLM.from_pretrained({json.dumps(model)}, dtype="auto")',
    ]
    if apart:
        lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(_adapter(record))})")
    return "\n".join(lines)


def loaded_with(record: Record) -> tuple[str, ...]:
    """Packages that transformers needs for the checkpoint's format."""
    form = record["recipe"]["quantize"].get("format", "compressed-tensors")
    return FORMATS[form].LOADED_WITH if form in FORMATS else ()


def verify_command(record: Record) -> str:
    """What tells whether the published files are still as they were."""
    place = record.get("target") or f"./{record['recipe']['name']}"
    return f"quantize verify {shlex.quote(place)}"


def _model(record: Record) -> str:
    """The repository that it is published in, or a folder.

    With an adapter always a folder: vLLM takes one from there, not from a part of a repository.
    """
    folder = f"./{record['recipe']['name']}"
    return folder if "adapter" in record else record.get("target") or folder


def _adapter(record: Record) -> str:
    return f"{_model(record)}/adapter"


def _download(record: Record) -> str:
    """The line that makes the folder, where one is needed and the repository is known."""
    if "adapter" not in record or "target" not in record:
        return ""
    return f"hf download {record['target']} --local-dir {_model(record)}\n"
