"""Common GPUs, as their makers state them: `quantize/data/cards.json`, one entry a card.

`gigabytes` are 10^9 bytes; what a driver reports is a few percent more (an H100 of "80 GB" has
85.5e9 bytes), so a fit by this table is a fit on the card. `bandwidth` is in GB/s and
`bf16_tflops` dense with FP32 sums, of the fastest form (SXM before PCIe). Where the maker's page
states it with sparsity alone, half of that; of the RTX PRO 6000, four times its FP32 rate (24,064
cores x 2 x 2.617 GHz), as of the RTX 6000 Ada: an eighth of the 4000 TOPS, FP4 with sparsity, that
its page rounds to. A B200 has 180 GB: an eighth of what a DGX B200 states, less than the chips on
the board hold; a driver reports 183,359 MiB.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "data" / "cards.json"


@dataclass(frozen=True)
class Card:
    """One card. `smi` is a pattern that stands in the name that nvidia-smi prints for it."""

    name: str
    smi: str
    gigabytes: int
    bandwidth: int
    capability: str  # CUDA's compute capability, or AMD's target
    architecture: str
    bf16_tflops: float
    on_model_cards: bool  # listed in the short table of a model card
    source: str

    @property
    def bytes(self) -> int:
        """Memory of one card."""
        return self.gigabytes * 10**9

    @property
    def cuda(self) -> bool:
        """Whether the tools' environments are locked for it."""
        return self.capability[0].isdigit()

    @property
    def blackwell(self) -> bool:
        """Compute capability 10.0 or above."""
        return self.cuda and int(self.capability.partition(".")[0]) >= 10

    @property
    def formats(self) -> str:
        """What its matrix units multiply, beside BF16: by compute capability.

        CUDA C++ programming guide, "Tensor core operations": INT8 from 7.2, FP8 from 8.9, FP4 from
        10.0. Weights of 4 bits without 4-bit activations need none of it: they are unpacked.
        """
        if not self.cuda:
            return "INT8, FP8"  # CDNA 3 white paper: both, FP8 in the FNUZ form
        major, minor = map(int, self.capability.split("."))
        has = ["INT8"]
        has += ["FP8"] if (major, minor) >= (8, 9) else []
        return ", ".join([*has, "FP4"] if self.blackwell else has)


@dataclass(frozen=True)
class Gpu:
    """Cards of one size, for the short table of a model card."""

    gigabytes: int
    names: str
    source: str

    @property
    def bytes(self) -> int:
        """Memory of one card."""
        return self.gigabytes * 10**9


def _read() -> tuple[Card, ...]:
    return tuple(Card(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8")))


OTHERS = r"(?!.*\b(Ti|D|Laptop|MIG)\b)"
"""Behind a card's name: another card, or a part of one, with another rate or memory."""

CARDS = _read()
"""All of them, smallest first."""


def _sizes() -> tuple[Gpu, ...]:
    listed = [card for card in CARDS if card.on_model_cards]
    groups = [list(group) for _, group in groupby(listed, lambda card: card.gigabytes)]
    return tuple(
        Gpu(group[0].gigabytes, ", ".join(card.name for card in group), group[-1].source)
        for group in groups
    )


GPUS = _sizes()
"""The sizes that a model card shows; the source is the maker's page of the last card named."""


def find_card(name: str) -> Card | None:
    """The card of this name in the table, or the one that nvidia-smi calls so; None if unknown."""
    wanted = name.strip().casefold()
    for card in CARDS:
        if card.name.casefold() == wanted or card.name.casefold().replace(" ", "") == wanted:
            return card
    found = [card for card in CARDS if re.search(rf"\b{card.smi}\b{OTHERS}", name, re.I)]
    return found[0] if len(found) == 1 else None


def known_names() -> str:
    """For messages."""
    return ", ".join(card.name for card in CARDS)
