"""What the formulas read of a model, and what they give: shapes in, named bytes out.

The standard library alone: benchmarks in the tools' environments hold the formulas against what
was measured there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BF16 = 2
FP32 = 4

SHARED_INPUT = re.compile(r"(?:(?P<qkv>[qkv]_proj)|(?P<gate_up>gate_proj|up_proj))$")
"""Linears that read the same tensor as others: q, k and v; gate and up."""


@dataclass(frozen=True)
class Linear:
    """A weight (rows, columns) that is quantized, by its name within its layer."""

    name: str
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Numbers in the weight."""
        return self.rows * self.columns

    @property
    def reads(self) -> str:
        """A name for its input: the same for linears that read the same tensor."""
        found = SHARED_INPUT.search(self.name)
        if found is None:
            return self.name
        return self.name[: found.start()] + ("qkv" if found["qkv"] else "gate_up")


@dataclass(frozen=True)
class Decoder:
    """A language model's largest layer, and what is around its layers. Bytes are as stored."""

    hidden: int
    layers: int
    linears: tuple[Linear, ...]  # of the largest layer
    layer_elements: int  # of its tensors, quantized or not
    outside_elements: int  # embedding, last norm, head
    embedding_elements: int
    stored_bytes: int = BF16  # of a number in the files

    @property
    def units(self) -> dict[str, tuple[Linear, ...]]:
        """Linears by the input that they share."""
        found: dict[str, tuple[Linear, ...]] = {}
        for linear in self.linears:
            found[linear.reads] = (*found.get(linear.reads, ()), linear)
        return found

    @property
    def inner(self) -> int:
        """Width of the widest tensor that a token has within a layer."""
        widths = [max(linear.rows, linear.columns) for linear in self.linears]
        return max(widths, default=self.hidden)


@dataclass(frozen=True)
class Part:
    """Bytes, and what they are, in words.

    `spare`: the run would go on with less of it (file pages that the kernel takes back, what a
    library might keep), so that nothing is refused for its sake.
    """

    what: str
    bytes: int
    spare: bool = False


@dataclass(frozen=True)
class Peak:
    """What is in memory at once at the worst moment."""

    when: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """All of it: what to expect at most."""
        return sum(part.bytes for part in self.parts)

    @property
    def certain(self) -> int:
        """What it cannot do without: with less than this a run fails."""
        return sum(part.bytes for part in self.parts if not part.spare)


def highest(moments: list[Peak]) -> Peak:
    """The moment with the most."""
    return max(moments, key=lambda peak: peak.bytes)
