"""What the streaming engine holds, from shapes: `quantize/engine/`, moment by moment.

With d the hidden size, n the columns of a linear's input, R x n a weight, B tokens of a batch and
L the layer's numbers, all in BF16 (2 bytes) unless FP32 (4 bytes) is said:

- a layer, 2 L, and the next, 2 L, that is read in the meantime (on a GPU: in the host's memory);
- Gram matrices in FP32, 4 n^2 for each distinct input (`inputs.Inputs`), to the layer's end;
- a pass: activations, 2 B (4 inner + 8 d), and where they are taken up in a Gram matrix, on a CPU
  an FP32 and a BF16 copy of them, 6 B n; on a GPU a product of n^2 / 4 in FP32;
- completing a Gram matrix: three temporaries of 4 n^2 (`Inputs.complete`);
- AWQ's search: a scaled copy, 4 n^2, for each linear behind the same norm, and of the largest
  linear 12 R n while finalists are rounded (`awq.search`);
- AWQ's clipping: H's blocks, 4 n^2 at most, and 24 bytes a number of at most 2^24 numbers at once
  (`clip.clip`);
- GPTQ: with W = 4 R n of the linears that share an input, W + 3 x 4 n^2 while the matrix is
  factorised (reordered copy, factor, factor turned round), 5 W + 4 n^2 at the end of the columns
  (`gptq.quantize`);
- packing: 12 bytes a number of the largest linear, and what is packed already.

Batches: 4096 tokens on a CPU, 32768 on a GPU, a quarter of all at most, and one sequence at least.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from quantize.capacity.parts import BF16, FP32, Decoder, Part, Peak, highest
from quantize.modules import served_unit

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""As in `engine.hidden`; a test compares them."""

IMPORTS_BYTES = {"cpu": 700_000_000, "cuda": 4_000_000_000}
"""Interpreter, torch, transformers, llm-compressor; on CUDA its libraries. Measured on a CPU
(bench/memory.md: 0.54 GB resident), an estimate on CUDA."""

CUDA_SHARE = 0.1
"""Of a GPU peak, on top: what torch's allocator keeps in blocks that do not fit."""

PACKING_BYTES = 12
CLIPPING_BYTES, CLIPPED_TOGETHER = 24, 1 << 24
PACKED_SHARE = 0.5
"""Of a layer in BF16 that its packed form takes at most (8 bits; 4 bits take 0.27)."""

PAGES = "pages of the file that is read"


@dataclass(frozen=True)
class Run:
    """How a layer is quantized."""

    method: str
    tokens: int  # of calibration data; 0 without
    longest: int  # tokens of the longest sequence
    device: str  # cpu or cuda
    clip: bool = False

    @property
    def gptq(self) -> bool:
        """Whether columns are rounded one after another."""
        return "gptq" in self.method or self.method == "int8"

    @property
    def batch(self) -> int:
        """Tokens that go through a layer at once."""
        return max(min(BATCH_TOKENS[self.device], self.tokens // 4), min(self.longest, self.tokens))


def device_peak(model: Decoder, run: Run) -> Peak:
    """GPU memory of one process, without hidden states that stay there where there is room.

    The engine keeps those of two layers, 4 T d bytes, if they take a quarter of what is free at
    most (`hidden.fits`): never what a run fails by.
    """
    found = highest(_moments(model, run))
    spare = Part("what the allocator keeps", round(CUDA_SHARE * found.bytes), spare=True)
    return Peak(found.when, (*found.parts, spare))


def held_hidden_states(model: Decoder, run: Run, free: int) -> int:
    """Bytes of hidden states that stay on a GPU with `free` bytes; see :func:`device_peak`."""
    both = 2 * run.tokens * model.hidden * BF16
    return both if both <= free // 4 else 0


def host_peak(model: Decoder, run: Run) -> Peak:
    """Resident memory of the process: on a CPU everything, on a GPU what feeds it."""
    imports = Part("interpreter and libraries", IMPORTS_BYTES[run.device], spare=True)
    layer, stored = BF16 * model.layer_elements, model.stored_bytes * model.layer_elements
    reading = (Part("the layer that is read ahead", layer), Part(PAGES, stored, spare=True))
    moments = [_outside(model), _packed(model)]
    if run.device == "cpu":
        moments += _moments(model, run)
        pinned: tuple[Part, ...] = ()
    else:
        moments.append(Peak("a layer", (Part("the layer", layer),)))
        states = 4 * run.batch * model.hidden * BF16
        pinned = (Part("pinned batches of hidden states", states, spare=True),)
    found = highest(
        [
            Peak(one.when, one.parts if one.when == OUTSIDE else (*one.parts, *reading))
            for one in moments
        ]
    )
    return Peak(found.when, (*found.parts, *pinned, imports))


OUTSIDE = "what lies outside the layers"


def _outside(model: Decoder) -> Peak:
    own = Part("embedding and head", BF16 * model.outside_elements)
    return Peak(
        OUTSIDE, (own, Part(PAGES, model.stored_bytes * model.outside_elements, spare=True))
    )


def _packed(model: Decoder) -> Peak:
    """The end of a layer: packed one linear after another."""
    layer = Part("the layer", BF16 * model.layer_elements)
    largest = max((linear.elements for linear in model.linears), default=0)
    packed = Part("the packed layer", round(PACKED_SHARE * layer.bytes), spare=True)
    return Peak("packing", (layer, packed, Part("packing a linear", PACKING_BYTES * largest)))


def _moments(model: Decoder, run: Run) -> list[Peak]:
    """What the device holds of the layer at each of its steps."""
    packing = _packed(model)
    if not run.tokens:
        return [packing]
    layer = packing.parts[0]
    widths = [linears[0].columns for linears in model.units.values()]
    grams = Part("Gram matrices", FP32 * sum(n * n for n in widths))
    held = (layer, grams)
    embedding = Part("the embedding", BF16 * model.embedding_elements)
    states = Part("activations", 2 * run.batch * model.hidden * BF16)
    moments = [
        Peak("packing", (*packing.parts, grams)),
        Peak("embedding", (embedding, states)),
        Peak("a pass", (*held, _activations(model, run))),
        Peak("completing a Gram matrix", (*held, _matrices(3, max(widths)))),
    ]
    if "awq" in run.method:
        moments += [Peak("AWQ's search", (*held, *_search(model)))]
    if run.clip:
        numbers = min(max(linear.elements for linear in model.linears), CLIPPED_TOGETHER)
        rounding = Part("rounding a range", CLIPPING_BYTES * numbers, spare=True)
        moments += [Peak("AWQ's clipping", (*held, _matrices(1, max(widths)), rounding))]
    if run.gptq:
        moments += [Peak("GPTQ", (*held, one)) for one in _gptq(model)]
    return moments


def _matrices(count: int, columns: int) -> Part:
    return Part(f"{count} copies of a Gram matrix", count * FP32 * columns**2)


def _activations(model: Decoder, run: Run) -> Part:
    widest = max((linear.columns for linear in model.linears), default=model.hidden)
    own = BF16 * run.batch * (4 * model.inner + 8 * model.hidden)
    copies = 6 * run.batch * widest if run.device == "cpu" else FP32 * widest**2 // 4
    return Part("activations of a batch", own + copies, spare=True)  # batches may be smaller


def _search(model: Decoder) -> tuple[Part, Part]:
    copies: dict[str, int] = defaultdict(int)  # by what is scaled together: q, k, v; all experts
    for linear in model.linears:
        copies[served_unit(linear.name)] += linear.columns**2
    largest = max(linear.elements for linear in model.linears)
    return (
        Part("a Gram matrix for each linear", FP32 * max(copies.values())),
        Part("rounding a finalist", PACKING_BYTES * largest, spare=True),
    )


def _gptq(model: Decoder) -> list[Part]:
    found = []
    for linears in model.units.values():
        weight = FP32 * sum(linear.elements for linear in linears)
        matrix = FP32 * linears[0].columns ** 2
        found.append(Part("weights and factor", max(weight + 3 * matrix, 5 * weight + matrix)))
    return found
