"""Is the merged checkpoint, as it was saved, the same function as base and adapter unmerged?

Both are run on the same tokens, with every weight raised to FP32 while it is used, so that the
arithmetic itself adds next to nothing. What is left between their logits is what rounding the
merged weights to BF16 does, and how much that may be is measured, not guessed: the unmerged pair is
run once more with an error drawn for each weight that saving rounds, uniform over half a BF16 step
to either side. That is the error of rounding to nearest, so the two changes of the logits must be
alike.

    change(a, b) = sqrt(mean((a - b)²)), with each position's mean over the vocabulary taken out
    passes:  change(pair, merged) <= FACTOR · change(pair, pair with errors) + FLOOR · spread(pair)

spread(pair) = change(pair, 0). A wrong scaling, a module that was left out or a transposed delta
changes the logits by a share of what the whole adapter does to them, which is recorded beside it.

Memory: one layer, or the embedding or head, in FP32 beside the model; FP32 logits of 256 tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer

FACTOR = 3.0
"""How much more than the drawn errors the merge may change: one draw of them against another."""

FLOOR = 1e-4
"""Share of the logits' own spread that FP32 sums in another order may change."""

LENGTH = 64
DRAWN = 2
SEED = 0
TEXT = (
    "The bridge was closed in 1987: its piers had moved by 3.4 cm. A new one costs more, said "
    'the mayor: "We can\'t wait." for (i = 0; i < n; i++) { total += price[i] * 1.19; }\n'
)
QUESTION = "Why was the bridge closed, and what would a new one cost? Answer in two sentences."


def check_tokens(folder: Path, rows: int, first: list[int]) -> tuple[Tensor, str]:
    """Token ids (sequences, 64) for the check, and what they are, in words.

    A question through the chat template, where there is one, and a text, each repeated to the full
    length; and two sequences drawn from the vocabulary, the last of which begins with `first`
    (tokens that the adapter trained or added). `rows` is how many tokens the model knows.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    texts = [tokenizer(TEXT)["input_ids"]]
    what = "a text"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        texts.insert(0, tokenizer(rendered, add_special_tokens=False)["input_ids"])
        what = "a question through the chat template, a text"
    known = min(rows, len(tokenizer))
    drawn = torch.randint(known, (DRAWN, LENGTH), generator=torch.Generator().manual_seed(SEED))
    drawn[-1, : len(first[:LENGTH])] = torch.tensor(first[:LENGTH], dtype=torch.int64)
    filled = [list(itertools.islice(itertools.cycle(text), LENGTH)) for text in texts if text]
    ids = torch.cat([torch.tensor(filled, dtype=torch.int64).reshape(-1, LENGTH), drawn])
    return ids, f"{what}, and {DRAWN} sequences drawn from the vocabulary"


def logits(model: nn.Module, ids: Tensor, *, errors: bool = False) -> Tensor:
    """Logits (positions, vocabulary) in FP32; with `errors`, of weights as rounding leaves them."""
    with torch.no_grad(), _in_float32(model, errors):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    found = found.float().flatten(0, 1)
    return found - found.mean(dim=-1, keepdim=True)


def compare(pair: Tensor, rounded: Tensor, base: Tensor, merged: Tensor) -> dict[str, Any]:
    """The figures of the check from logits (positions, vocabulary); `passed` among them.

    `base` is the base alone and may have fewer tokens. KL divergences are means over positions, in
    nats: KL(pair ‖ other).
    """
    change, allowed = _change(pair, merged), _change(pair, rounded)
    spread = float(pair.square().mean().sqrt())
    tolerance = FACTOR * allowed + FLOOR * spread
    return {
        "passed": bool(change <= tolerance),  # a NaN is no pass
        "logit_change": change,
        "logit_change_of_rounding": allowed,
        "tolerance": tolerance,
        "logit_change_of_adapter": _change(pair[:, : base.shape[1]], base),
        "logit_spread": spread,
        "kl": _kl(pair, merged),
        "kl_of_rounding": _kl(pair, rounded),
        "top1_agreement": float((pair.argmax(-1) == merged.argmax(-1)).double().mean()),
        "positions": pair.shape[0],
    }


def _change(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean().sqrt())


def _kl(first: Tensor, second: Tensor) -> float:
    left, right = log_softmax(first.double(), -1), log_softmax(second.double(), -1)
    return float(kl_div(right, left, reduction="batchmean", log_target=True))


@contextmanager
def _in_float32(model: nn.Module, errors: bool) -> Iterator[None]:
    """Inside, each unit's parameters are FP32 while it runs, and afterwards what they were."""
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}
    draw = torch.Generator().manual_seed(SEED)
    spoilt = _rounded_when_saved(model) if errors else {}

    def enter(unit: nn.Module, *_: Any) -> None:
        held[unit] = [(p, p.data) for p in unit.parameters() if p.is_floating_point()]
        for parameter, values in held[unit]:
            raised = values.float()
            if id(parameter) in spoilt:
                raised = raised + _error(raised, spoilt[id(parameter)], draw)
            parameter.data = raised

    def leave(unit: nn.Module, *_: Any) -> None:
        for parameter, values in held.pop(unit, ()):
            parameter.data = values

    handles = [unit.register_forward_pre_hook(enter) for unit in _units(model)]
    handles += [unit.register_forward_hook(leave, always_call=True) for unit in _units(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Layers, what peft has wrapped, and whatever else has parameters of its own."""
    if isinstance(module, nn.ModuleList):
        yield from module
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or module._parameters:
        yield module
    else:
        for child in module.children():
            yield from _units(child)


def _rounded_when_saved(model: nn.Module) -> dict[int, BaseTunerLayer | None]:
    """Ids of the parameters that merging changes or saving rounds, with the layer of a delta."""
    found: dict[int, BaseTunerLayer | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.bfloat16 and ".lora_" not in name:
            found[id(parameter)] = None
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            weight = getattr(module.get_base_layer(), "weight", None)
            if weight is not None and module.active_adapters[0] in getattr(module, "scaling", ()):
                found[id(weight)] = module
    return found


def _error(values: Tensor, layer: BaseTunerLayer | None, draw: torch.Generator) -> Tensor:
    """Uniform over half a BF16 step to either side; a step is 2^-7 of the power of two below."""
    near = values
    if layer is not None:
        delta: Tensor = layer.get_delta_weight(layer.active_adapters[0])
        near = values + delta.float()
    _, exponent = torch.frexp(near)  # |near| = mantissa · 2^exponent, 1/2 <= mantissa < 1
    step = torch.ldexp(torch.ones_like(near), exponent - 8)
    return (torch.rand(values.shape, generator=draw) - 0.5) * step
