"""The figures of one recipe's plan: every stage's needs, time and cost; what each card can do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from quantize.capacity.cards import CARDS, Card, find_card
from quantize.capacity.cost import dollars, dollars_per_million_tokens
from quantize.capacity.estimate import (
    Needs,
    cache_value_bytes,
    context_length,
    decoder,
    engine_run,
    served_bytes,
    stage_needs,
    streams,
)
from quantize.capacity.serving import attention, context_tokens
from quantize.capacity.work import least_seconds
from quantize.checkpoint import Checkpoint
from quantize.recipe import Recipe
from quantize.resource_checks import Gpus, even_sizes, fitting_size, target_gpus
from quantize.servers.support import NOT_ON_BLACKWELL

SHOWN_SIZES = (1, 2, 4, 8)

TOOK = "of a stage that is done, or of the last run of this recipe, what it took"
BOUND = (
    "with ≥, operations over the BF16 rate of all cards: no run whose calibration sequences are "
    "all full is faster, see docs/capacity.md"
)


@dataclass(frozen=True)
class Figures:
    """One stage: what it needs, and how long it takes where there is a basis for that."""

    needs: Needs
    seconds: float | None = None
    at_least: bool = False
    basis: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class OnCard:
    """What one kind of card can do; sizes are tensor-parallel."""

    card: Card
    quantizes: bool  # the GPU memory of the compress stage; False where no tool is locked for it
    baseline: int | None  # the fewest cards that serve the BF16 checkpoint with one whole request
    context: Mapping[int, int | None]  # size → tokens beside the result; None: splits unevenly
    serves: bool  # False where vLLM has no kernel for the scheme
    per_million: float | None = None


@dataclass(frozen=True)
class Planned:
    """All figures; `missing` says what is not known, and why."""

    stages: tuple[Figures, ...] = ()
    cards: tuple[OnCard, ...] = ()
    sizes: tuple[int, ...] = SHOWN_SIZES
    weights: Mapping[str, int] = field(default_factory=dict)  # bytes: baseline, result
    machine: str = ""  # what the stages' needs are of: a CPU, or so many GPUs
    request_tokens: int | None = None  # of the longest request, which a server must hold
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Money:
    """Prices an hour and tokens a second: by card, and without a name for every card."""

    prices: Mapping[str, float] = field(default_factory=dict)
    throughputs: Mapping[str, float] = field(default_factory=dict)

    def price(self, card: str = "") -> float | None:
        """Price an hour, of this card where one is given for it."""
        return self.prices.get(card.casefold(), self.prices.get(""))

    def per_million(self, card: str) -> float | None:
        """What a million tokens cost on a card; None without a price or a throughput."""
        price = self.price(card)
        speed = self.throughputs.get(card.casefold(), self.throughputs.get(""))
        return None if price is None or not speed else dollars_per_million_tokens(price, speed)


def planned(
    checkpoint: Checkpoint,
    recipe: Recipe,
    accelerator: str,
    stages: Sequence[tuple[str, str]],
    money: Money,
    took: Mapping[str, float],
    *,
    downloads: Collection[str] = (),
    unpacks: bool = False,
) -> Planned:
    """`stages` are (id, kind); `took` has the seconds of those that ran before."""
    device = "cuda" if recipe.machine.gpu is not None else accelerator
    unpacks = unpacks and device == "cpu"
    needs = stage_needs(checkpoint, recipe, device, stages, downloads=downloads, unpacks=unpacks)
    target = target_gpus(recipe, accelerator)
    least = _least(checkpoint, recipe, target) if target is not None else None
    price = money.price(target.name if target else "")
    missing = []
    if money.throughputs and not money.prices:
        missing.append("no price: --price-per-hour or machine.price_per_hour")
    shape = attention(checkpoint.text_config)
    if isinstance(shape, str):
        missing.append(f"no context: {shape}")
    return Planned(
        stages=tuple(_figures(one, took, least, price) for one in needs),
        cards=_on_cards(checkpoint, recipe, money),
        weights={
            "baseline": served_bytes(checkpoint, recipe, "measure-baseline", False),
            "result": served_bytes(checkpoint, recipe, "measure-candidate", False),
        },
        machine=_machine(device, target),
        request_tokens=context_length(checkpoint, recipe),
        missing=tuple(missing),
    )


def _machine(device: str, target: Gpus | None) -> str:
    if device == "cpu":
        return "a CPU"
    return "a GPU" if target is None else f"{target.count} × {target.name}"


def _figures(
    needs: Needs, took: Mapping[str, float], least: float | None, price: float | None
) -> Figures:
    seconds, bound, basis = took.get(needs.stage), False, TOOK
    if seconds is None and needs.stage == "compress" and least and least >= 1:
        seconds, bound, basis = least, True, BOUND
    if seconds is None:
        return Figures(needs)
    cost = None if price is None else dollars(price, seconds)
    return Figures(needs, seconds, bound, basis, cost)


def _least(checkpoint: Checkpoint, recipe: Recipe, target: Gpus) -> float | None:
    """Seconds of the streaming engine on all these cards at least; None without a rate or data."""
    card, run = find_card(target.name), engine_run(recipe, "cuda")
    if card is None or not run.tokens or not streams(checkpoint, recipe):
        return None
    rate = card.bf16_tflops * target.count  # a process a card, see docs/engine.md
    return least_seconds(decoder(checkpoint, recipe.quantize), run, rate)


def _on_cards(checkpoint: Checkpoint, recipe: Recipe, money: Money) -> tuple[OnCard, ...]:
    (compress,) = stage_needs(checkpoint, recipe, "cuda", [("compress", "compress")])
    on_device = compress.device.bytes if compress.device is not None else 0
    shape = attention(checkpoint.text_config)
    weights = served_bytes(checkpoint, recipe, "measure-candidate", False)
    value = cache_value_bytes(recipe, "measure-candidate")
    even, whole = even_sizes(checkpoint, recipe.quantize), even_sizes(checkpoint, None)
    schemes = {one.scheme for one in recipe.quantize.overrides} | {recipe.quantize.effective_scheme}
    served = {(recipe.serve.engine, scheme) for scheme in schemes}

    def context(card: Card, size: int) -> int | None:
        if isinstance(shape, str) or size not in even:
            return None
        utilization = recipe.serve.gpu_memory_utilization
        return context_tokens(card.bytes, utilization, weights, shape, size, value)

    return tuple(
        OnCard(
            card=card,
            quantizes=card.cuda and on_device <= card.bytes,
            baseline=fitting_size(checkpoint, recipe, card.bytes, "measure-baseline", whole),
            context={size: context(card, size) for size in SHOWN_SIZES},
            per_million=money.per_million(card.name),
            serves=not (card.blackwell and NOT_ON_BLACKWELL & served),
        )
        for card in CARDS
    )
