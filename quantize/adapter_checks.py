"""Can an adapter be merged into its base, or served beside it? Names and shapes, no weights.

`merge` and `separate` (`model.adapter_mode`) refuse different things: see docs/adapters.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.adapter import Adapter, bare, read_adapter
from quantize.checkpoint import EMBEDDING, Checkpoint
from quantize.findings import Finding
from quantize.modules import module_name
from quantize.servers.vllm_lora import RANKS
from quantize.tensors import TensorInfo

HARMLESS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size"),
        *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
        *("trainable_token_indices", "use_dora", "use_rslora"),
    )
)
"""Fields of peft 0.21's LoraConfig that merging gets right, or that concern the training alone."""

REFUSED = {
    "alora_invocation_tokens": "aLoRA acts on a part of each prompt only",
    "arrow_config": "Arrow chooses between several adapters by token",
    "kasa_config": "KaSA takes singular values out of the base's weights first",
    "layer_replication": "it stacks the base's layers into a larger model",
    "megatron_config": "it was trained on Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "target_parameters": "LoRA on parameters instead of modules (fused experts) is not verified",
    "use_bdlora": "BD-LoRA is not verified",
    "use_qalora": "QALoRA averages groups of inputs, for a GPTQ base",
    "velora_config": "VeLoRA is not verified",
}
"""Fields that change what the adapter computes in a way that neither mode gets right."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base as it is; what changes it is refused."""

EXPERTS = re.compile(r"\.experts(\.|$)")

SERVED_RANK = RANKS[-1]

MERGED_ELSEWHERE = "merge it with the tool that trained it, and name the result in model.source"


def check_adapter(
    folder: Path, mode: str = "merge", checkpoint: Checkpoint | None = None
) -> list[Finding]:
    """All that keeps an adapter from being used; against its base where that is known."""
    adapter, findings = read_adapter(folder)
    if adapter is None:
        return findings
    findings = list(_config_findings(adapter.config)) + _expert_findings(adapter)
    if mode == "separate":
        findings += _served_findings(adapter)
    if checkpoint is not None and not findings:
        findings += _name_findings(adapter, _Base(checkpoint))
        findings += _saved_findings(adapter, _Base(checkpoint))
    return findings


class _Base:
    """The base's weights and biases by bare module name; (out, in) for linears."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tied = checkpoint.tied_embeddings
        self.weights: dict[str, TensorInfo] = {}
        self.biases: dict[str, TensorInfo] = {}
        for name, info in checkpoint.tensors.items():
            kind = self.biases if name.endswith(".bias") else self.weights
            kind[bare(name.removesuffix(".bias") if kind is self.biases else module_name(name))] = (
                info
            )
        self.embeddings = [n for n, i in self.weights.items() if EMBEDDING.search(i.name)]
        if self.tied and self.embeddings:
            self.weights.setdefault("lm_head", self.weights[self.embeddings[0]])


def _config_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    for name, value in config.items():
        if name in HARMLESS or not value:
            continue
        reason = REFUSED.get(name, "this version does not know the field")
        yield Finding(f"the adapter sets {name}: {reason}", MERGED_ELSEWHERE)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        yield Finding(
            f"the adapter began as {start} (init_lora_weights), which changes the base's weights: "
            "with the base as published it computes something else",
            "save it again with peft's path_initial_model_for_weight_conversion, or merge it where "
            "it was trained",
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        message = f"the adapter is for {config['task_type']}, not CAUSAL_LM"
        yield Finding(message, "name an adapter of a causal language model")


def _expert_findings(adapter: Adapter) -> list[Finding]:
    experts = [name for name in adapter.modules if EXPERTS.search(name)]
    if not experts:
        return []
    message = f"the adapter has LoRA on experts ({_some(experts)}), which is not verified"
    return [Finding(message, MERGED_ELSEWHERE)]


def _served_findings(adapter: Adapter) -> list[Finding]:
    """What vLLM 0.32 does not serve beside a base."""
    config = adapter.config
    outside = [n for n in adapter.with_part("lora_A", "embedding_A") if _is_outer(n)]
    reasons = {
        "DoRA (use_dora)": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        f"biases (bias: {config.get('bias')})": config.get("bias") not in (None, "none"),
        "biases of its own (lora_bias)": config.get("lora_bias"),
        "trained tokens (trainable_token_indices)": config.get("trainable_token_indices"),
        f"whole weights ({_some(adapter.with_part('weight', 'bias', 'tokens'))})": (
            adapter.with_part("weight", "bias", "tokens")
        ),
        f"LoRA outside the layers ({_some(outside)})": outside,
        f"rank {adapter.rank}, above {SERVED_RANK}": adapter.rank > SERVED_RANK,
    }
    return [
        Finding(f"vLLM cannot serve this adapter apart: it has {what}", "use adapter_mode: merge")
        for what, found in reasons.items()
        if found
    ] + [
        Finding(f"vLLM wants {name} in adapter_config.json, which lacks it", "add it")
        for name in ("lora_alpha", "target_modules")
        if not config.get(name)
    ]


def _is_outer(module: str) -> bool:
    return module == "lm_head" or EMBEDDING.search(f"{module}.weight") is not None


def _name_findings(adapter: Adapter, base: _Base) -> list[Finding]:
    """Tensors that belong to nothing of the base, or do not fit; modules without tensors."""
    lost = [*adapter.strange, *(name for name in adapter.modules if name not in base.weights)]
    faults = []
    if lost:
        faults.append(f"it has tensors for {_some(lost)}, which the base has not")
    wrong = [
        text
        for name, parts in adapter.modules.items()
        if name in base.weights
        for text in _shape_faults(adapter, name, parts, base)
    ]
    if wrong:
        faults.append(_some(wrong))
    missing = [name for name in _targets(adapter, base) if not _adapted(adapter, name)]
    if missing:
        faults.append(f"target_modules names {_some(missing)}, and it has no tensors for that")
    return [
        Finding(
            f"the adapter in {adapter.folder} does not fit the base: {fault}",
            "name the base that it was trained on in model.source, or a complete adapter",
        )
        for fault in faults
    ]


def _adapted(adapter: Adapter, name: str) -> bool:
    parts = set(adapter.modules.get(name, ()))
    return {"lora_A", "lora_B"} <= parts or {"embedding_A", "embedding_B"} <= parts


def _shape_faults(
    adapter: Adapter, name: str, parts: Mapping[str, TensorInfo], base: _Base
) -> Iterator[str]:
    shape, rank = base.weights[name].shape, adapter.rank_of(name)
    if len(shape) == 2 and adapter.config.get("fan_in_fan_out") and "lora_A" in parts:
        out, fan_in = shape if parts["lora_A"].shape[-1] == shape[1] else shape[::-1]
    elif len(shape) == 2:
        out, fan_in = shape
    else:
        out, fan_in = shape[0], 0
    rows = _rows(adapter, name, base)
    wanted: dict[str, tuple[int, ...]] = {
        "lora_A": (rank, fan_in),
        "lora_B": (rows if _is_outer(name) else out, rank),
        "lora_bias": (out,),
        "embedding_A": (rank, rows),
        "embedding_B": (fan_in, rank),
        "weight": (rows, *shape[1:]),
    }
    if name in base.biases:
        wanted["bias"] = base.biases[name].shape
    for part, info in parts.items():
        if part in ("bias", "lora_bias") and name not in base.biases:
            yield f"{name} has a bias in the adapter ({part}) and none in the base"
        elif part in wanted and tuple(info.shape) != wanted[part]:
            yield f"{info.name} is {list(info.shape)}, not {list(wanted[part])}"
    for first, second in (("lora_A", "lora_B"), ("embedding_A", "embedding_B")):
        if (first in parts) != (second in parts):
            yield f"{name} has one of {first} and {second} only"


def _rows(adapter: Adapter, name: str, base: _Base) -> int:
    """Rows of a weight; of embedding and head, as many as the adapter gives them."""
    rows = base.weights[name].shape[0]
    return max(rows, _saved_rows(adapter)) if _is_outer(name) else rows


def _saved_rows(adapter: Adapter) -> int:
    """Rows of the embedding or head that the adapter brings whole; 0 if it brings none."""
    outer = [
        parts["weight"]
        for n, parts in adapter.modules.items()
        if _is_outer(n) and "weight" in parts
    ]
    return max((info.shape[0] for info in outer), default=0)


def _saved_findings(adapter: Adapter, base: _Base) -> list[Finding]:
    """Whole modules and trained tokens: named ones are there, and added tokens have all rows."""
    findings = [
        Finding(
            f"modules_to_save names {entry}, and the adapter has no weight of it",
            "save the adapter again, all of it",
        )
        for entry in adapter.config.get("modules_to_save") or ()
        if not any(f".{n}".endswith(f".{entry}") for n in adapter.with_part("weight"))
    ]
    rows, known = _saved_rows(adapter), [base.weights[name].shape[0] for name in base.embeddings]
    if rows > max(known, default=rows):
        whole = [name for name in adapter.with_part("weight") if _is_outer(name)]
        needed = [*base.embeddings, *(["lm_head"] if "lm_head" in base.weights else [])]
        saved = adapter.config.get("modules_to_save") or ()
        lacking = [name for name in needed if name not in whole]
        if lacking and (not base.tied or saved):
            findings.append(
                Finding(
                    f"the adapter adds {rows - max(known)} tokens and brings rows for "
                    f"{_some(whole)} alone: {_some(lacking)} has none for them",
                    "train with modules_to_save: [embed_tokens, lm_head], or name a base that "
                    "was saved with the added tokens",
                )
            )
    if base.tied and adapter.config.get("ensure_weight_tying"):
        message = "the adapter keeps embedding and head tied (ensure_weight_tying)"
        findings.append(Finding(f"{message}, which is not verified", MERGED_ELSEWHERE))
    return findings


def _targets(adapter: Adapter, base: _Base) -> list[str]:
    """Modules of the base that peft would adapt, where that can be told from names.

    Experts are no modules of their own in transformers 5; and a part of the base of which the
    adapter has nothing (a vision tower) need not have been there in training.
    """
    config = adapter.config
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear":
        return []
    parts = {name.partition(".")[0] for name in adapter.modules}
    chosen = [
        name
        for name in base.weights
        if _hits(targets, name, base)
        and name.partition(".")[0] in parts
        and not EXPERTS.search(name)
    ]
    if excluded:
        chosen = [name for name in chosen if not _hits(excluded, name, base)]
    layers = config.get("layers_to_transform")
    if layers is None:
        return chosen
    if config.get("layers_pattern"):
        return []
    wanted = {layers} if isinstance(layers, int) else set(layers)
    return [n for n in chosen if (m := re.search(r"\.(\d+)\.", n)) and int(m[1]) in wanted]


def _hits(targets: Any, name: str, base: _Base) -> bool:
    """As peft: a regular expression for the whole name, or endings of it."""
    info = base.weights[name]
    full = module_name(info.name) if name != "lm_head" else name
    if isinstance(targets, str):
        return re.fullmatch(targets, full) is not None
    return len(info.shape) == 2 and any(f".{full}".endswith(f".{bare(t)}") for t in targets)


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
