"""A commented recipe for a user's own checkpoint, filled in from its files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint import Checkpoint, card_metadata, read_checkpoint
from quantize.errors import SourceError, UsageError
from quantize.evaluation import DEFAULT_PERPLEXITY_RATIO, DEFAULT_RECOVERY
from quantize.modules import module_name
from quantize.quantization import Quantize
from quantize.resources import find_checkpoint, shipped_root
from quantize.schemes import DATA_FREE, DEFAULT_SCHEME, GROUPED, MADE_HERE
from quantize.tensors import TensorInfo
from quantize.yaml_values import parse

GROUP_SIZES = (128, 64, 32)
PARALLEL_SIZES = (1, 2, 4, 8)
GPU_BYTES = 80e9 * 0.9
"""What vLLM takes of an 80 GB GPU at gpu_memory_utilization 0.90."""
WORKING_SHARE = 1.15
"""Weights, and room for activations and a KV cache beside them."""

STANDARD_WINDOW = 2048
"""Tokens of a perplexity window in the suites `standard` and `base`; a context must be longer."""

ROUTER = re.compile(r"\.(?:\w+\.)?(?:gate|router|shared_expert_gate)$")
ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|dense|wo|w2|out_proj|fc2)$")


@dataclass(frozen=True)
class Facts:
    """What a recipe needs to know of a checkpoint; None where only its owner can say."""

    source: str
    slug: str  # last part of the source, for the recipe's name
    local: bool
    group_size: int | None
    parallel_sizes: tuple[int, ...]  # that divide heads and groups
    measured_on: int  # GPUs of 80 GB that the BF16 weights need
    context: int | None  # tokens
    kv_bytes: int | None  # per token, in BF16
    parameters: int | None
    chat: bool
    routers: tuple[str, ...]  # `ignore` patterns
    base: str | None
    has_license: bool


def initial_recipe(source: str, method: str, name: str | None = None) -> str:
    """The text of a recipe for `source`, a folder (from the working directory) or a Hub repository.

    A folder is read: group size, context length, parallel sizes, routers, chat template and base
    model come from it. Nothing is fetched for a Hub repository; what must be looked at says so in a
    comment. Raises UsageError for an unknown method, SourceError for an unusable folder.
    """
    if method not in MADE_HERE:
        raise UsageError(f"there is no method {method!r}", f"choose one of {', '.join(MADE_HERE)}")
    folder = find_checkpoint(source, Path.cwd(), "SOURCE")
    grouped = DEFAULT_SCHEME[method] in GROUPED
    facts = _facts(folder, grouped) if folder is not None else _unknown(source, grouped)
    name = name or f"{slug(facts.slug)}-{method.replace('+', '-')}"
    if slug(name) != name:
        raise UsageError(f"a recipe cannot be called {name!r}", f"call it {slug(name)!r}, say")
    schema = shipped_root() / "recipes/recipe.schema.json"
    head = (
        f"# yaml-language-server: $schema={schema.as_uri()}\n"
        "# Check what is said in comments, then: quantize plan THIS_FILE\n"
        f"version: 1\nname: {scalar(name)}\n"
    )
    blocks = [
        head,
        _model(facts),
        _calibration(facts, method),
        _quantize(facts, method),
        _evaluate(facts, method),
        _serve(facts),
        f"publish:\n  folder: {scalar(f'out/{name}')}\n  # hub: {{repo: owner/name}}\n",
    ]
    return "\n".join(blocks)


def measuring_recipe(
    source: str, artifact: str, block: Mapping[str, Any], suite: str | None, name: str
) -> str:
    """The text of a recipe that measures `artifact`, which was made from `source` elsewhere.

    `block` is what the recipe's `quantize` says of it. SourceError for an unusable source folder.
    """
    folder = find_checkpoint(source, Path.cwd(), "--source")
    size = block.get("group_size")
    own = size if type(size) is int else None
    facts = _facts(folder, False, own) if folder is not None else _unknown(source, False)
    schema = shipped_root() / "recipes/recipe.schema.json"
    method = str(block["method"])
    lines = ["quantize:", f"  artifact: {scalar(artifact)} # made elsewhere; described below"]
    lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in block.items()]
    evaluate = _evaluate(facts, method)
    if suite is not None:
        evaluate = re.sub(r"suite: \S+ #.*", f"suite: {scalar(suite)}", evaluate, count=1)
    head = (
        f"# yaml-language-server: $schema={schema.as_uri()}\n"
        "# Written by `quantize measure`; to go on after a stop: quantize run THIS_FILE\n"
        f"version: 1\nname: {scalar(name)}\n"
    )
    return "\n".join([head, _model(facts), "\n".join(lines) + "\n", evaluate, _serve(facts)])


def scalar(text: str) -> str:
    """`text` as a YAML scalar: plain where every reader takes it for text, else quoted."""
    safe = re.fullmatch(r"[\w./+-]+", text) is not None and parse(text).value == text
    return text if safe else json.dumps(text, ensure_ascii=False)


def slug(text: str) -> str:
    """`text` as a recipe's name may be: lower case, digits, . _ + -"""
    return re.sub(r"[^a-z0-9._+-]+", "-", text.lower()).strip("-._+")[:60] or "my-model"


# What the files say


def _facts(folder: Path, grouped: bool, group_size: int | None = None) -> Facts:
    """With the `group_size` that an artifact has, or else the largest that fits."""
    checkpoint = read_checkpoint(folder)
    routers, linears = _routers(checkpoint)
    if grouped and group_size is None:
        group_size = _group_size(linears)
    kv_heads, head_size = _attention(checkpoint)
    layers = checkpoint.dimension("num_hidden_layers")
    kv_bytes = None
    if layers is not None and kv_heads is not None and head_size is not None:
        kv_bytes = layers * kv_heads * head_size * 2 * 2  # keys and values of two bytes each
    card = card_metadata(folder)
    base = card.get("base_model")
    if isinstance(base, list):
        base = base[0] if len(base) == 1 else None
    return Facts(
        source=str(folder.absolute()),
        slug=folder.absolute().resolve().name,
        local=True,
        group_size=group_size,
        parallel_sizes=_parallel_sizes(checkpoint, linears, group_size or 1),
        measured_on=_gpus(checkpoint.weight_bytes),
        context=checkpoint.dimension("max_position_embeddings"),
        kv_bytes=kv_bytes,
        parameters=checkpoint.parameters,
        chat=checkpoint.has_chat_template,
        routers=routers,
        base=base if isinstance(base, str) and base else None,
        has_license=bool(card.get("license")),
    )


def _unknown(source: str, grouped: bool) -> Facts:
    """A Hub repository that nobody has looked into: an instruct model of medium size, say."""
    return Facts(
        source=source,
        slug=source.partition("/")[2],
        local=False,
        group_size=GROUP_SIZES[0] if grouped else None,
        parallel_sizes=(1,),
        measured_on=1,
        context=None,
        kv_bytes=None,
        parameters=None,
        chat=True,
        routers=(),
        base=None,
        has_license=True,
    )


def _routers(checkpoint: Checkpoint) -> tuple[tuple[str, ...], list[TensorInfo]]:
    """`ignore` patterns of expert routers, and the linears of the layers that are no routers.

    A router's output picks experts: an error there changes which ones are asked at all.
    """
    experts = any(".experts." in name for name in checkpoint.tensors)
    patterns: set[str] = set()
    rest = []
    for info in checkpoint.layer_linears():
        found = ROUTER.search(module_name(info.name)) if experts else None
        if found is None:
            rest.append(info)
        else:
            patterns.add("re:.*" + re.escape(found.group().lstrip(".")) + "$")
    return tuple(sorted(patterns)), rest


def _group_size(linears: list[TensorInfo]) -> int:
    """The largest usual group size that divides every linear's input channels."""
    inputs = {info.shape[1] for info in linears}
    for size in GROUP_SIZES:
        if all(channels % size == 0 for channels in inputs):
            return size
    odd = sorted(channels for channels in inputs if channels % GROUP_SIZES[-1])
    raise SourceError(
        f"no group size of {', '.join(map(str, GROUP_SIZES))} divides {odd[0]} input channels",
        "use --method fp8 or int8, which have no groups",
    )


def _attention(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """Key-value heads, and channels per head."""
    heads = checkpoint.dimension("num_attention_heads")
    head_size = checkpoint.dimension("head_dim")
    if head_size is None and heads and checkpoint.hidden_size:
        head_size = checkpoint.hidden_size // heads
    return checkpoint.dimension("num_key_value_heads") or heads, head_size


def _parallel_sizes(
    checkpoint: Checkpoint, linears: list[TensorInfo], group_size: int
) -> tuple[int, ...]:
    """Sizes that split the heads evenly and leave whole groups on every GPU."""
    heads = checkpoint.dimension("num_attention_heads") or 1
    split = [info.shape[1] for info in linears if ROW_PARALLEL.search(module_name(info.name))]
    return tuple(
        size
        for size in PARALLEL_SIZES
        if heads % size == 0 and all(channels % (size * group_size) == 0 for channels in split)
    )


def _gpus(weight_bytes: int) -> int:
    """GPUs of 80 GB that serve the BF16 weights."""
    needed = weight_bytes * WORKING_SHARE / GPU_BYTES
    return next((size for size in PARALLEL_SIZES if size >= needed), PARALLEL_SIZES[-1])


# The blocks


def _model(facts: Facts) -> str:
    lines = ["model:", f"  source: {scalar(facts.source)}"]
    if not facts.local:
        lines.append("  revision: main # better: a commit's 40 hex digits, so that it cannot move")
    lines.append(
        "  # adapter: a LoRA adapter's folder or repository, merged (adapter_mode: separate)"
    )
    if facts.base is not None:
        lines.append(f"  base: {scalar(facts.base)} # from the checkpoint's README.md")
    else:
        lines.append("  # base: owner/name of the model that was fine-tuned, for the card")
    if not facts.has_license:
        lines.append("  # license: apache-2.0 # or what holds: README.md names none")
    return "\n".join(lines) + "\n"


def _calibration(facts: Facts, method: str) -> str:
    if (method, DEFAULT_SCHEME[method]) in DATA_FREE:
        return f"# No calibration block: {DEFAULT_SCHEME[method]} needs no data.\n"
    length = min(2048, facts.context or 2048)
    if facts.chat:
        lines = [
            "# Best is what the model was tuned on: a .jsonl file with a list `messages` a row.",
            "calibration:",
            "  source: HuggingFaceH4/ultrachat_200k # chats, put through the model's own template",
            "  revision: 8049631c405ae6576f93f445c6b8166f76f5505a",
            "  split: train_sft",
        ]
    else:
        lines = [
            "# Best is text like what the model will read: a .jsonl file with `text` a row.",
            "calibration:",
            "  source: Salesforce/wikitext # the checkpoint has no chat template: plain text",
            "  revision: b08601e04326c79dfdd32d625aee71d232d685c3",
            "  config: wikitext-2-raw-v1",
            "  split: train",
            "  packing: true # rows are short: join them",
        ]
    lines += ["  samples: 512", f"  sequence_length: {length}", "  seed: 0"]
    return "\n".join(lines) + "\n"


def _quantize(facts: Facts, method: str) -> str:
    lines = ["quantize:", f"  method: {method}", f"  scheme: {DEFAULT_SCHEME[method]}"]
    if facts.group_size is not None:
        why = (
            "divides the input channels of every layer"
            if facts.local
            else "must divide hidden_size and intermediate_size of config.json"
        )
        lines.append(f"  group_size: {facts.group_size} # {why}")
    ignore = ", ".join(["lm_head", *(f"'{pattern}'" for pattern in facts.routers)])
    why = " # and the routers, which pick the experts" if facts.routers else ""
    lines.append(f"  ignore: [{ignore}]{why}")
    if not facts.local:
        lines.append("  # a mixture of experts: ignore its routers too, e.g. 're:.*mlp.gate$'")
    return "\n".join(lines) + "\n"


def _evaluate(facts: Facts, method: str) -> str:
    parameters = facts.parameters or 0
    small = parameters < 500_000_000 or (facts.context or 4096) <= STANDARD_WINDOW
    if facts.local and small:
        suite, why = "smoke", "answers and perplexity; `standard` asks too much of a small model"
    elif facts.chat:
        suite, why = "standard", "needs the Hub for its tasks' data; `smoke` needs none"
    else:
        suite, why = "base", "for models without a chat template; needs the Hub"
    bits = Quantize.model_validate({"method": method}).weight_bits
    left, ratio = DEFAULT_RECOVERY[bits], DEFAULT_PERPLEXITY_RATIO[bits]
    return (
        f"evaluate:\n  suite: {suite} # {why}\n"
        f"  # The run fails unless it shows that {left:.0%} of the tasks' scores are left and\n"
        f"  # perplexity is within {ratio}x: the default margins with {bits}-bit weights. "
        "To set others:\n"
        f"  # margins: {{perplexity_ratio: 1.08, recovery: 0.95}}\n"
    )


def _serve(facts: Facts) -> str:
    length = min(facts.context or 16384, 16384)
    of = f"of {facts.context}" if facts.context else "at most the checkpoint's own"
    lines = ["serve:", f"  max_model_len: {length} # {of}", "  gpu_memory_utilization: 0.90"]
    if facts.kv_bytes is not None:
        gib = math.ceil(facts.kv_bytes * length / 2**30)
        lines.append(f"  kv_cache_gib: {max(1, gib)} # on a CPU: one sequence of that length")
    lines.append("  max_num_seqs: 64")
    measured = f"{facts.measured_on} # GPUs; of 80 GB, for the BF16 baseline"
    lines.append(f"  tensor_parallel_size: {measured if facts.local else '1 # GPUs'}")
    sizes = ", ".join(map(str, facts.parallel_sizes))
    lines.append(f"  tensor_parallel_sizes: [{sizes}] # every size that users will serve with")
    return "\n".join(lines) + "\n"
