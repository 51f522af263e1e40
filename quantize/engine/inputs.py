"""What calibration leaves of a linear's input: H = sum of x xT, and the sum of |x|.

Linears that read the same tensor share one record (q, k and v; gate and up): 4 Gram matrices in a
Llama layer, not 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

BLOCKS = 4


class LayerEnds(Exception):
    """Raised at the last watched input: nothing behind it is needed."""


@dataclass
class Inputs:
    """Statistics of one distinct input of a layer's linears.

    `gram`: (columns, columns) float32, sum over `sampled` tokens of x xT. `absolute`: (columns,)
    float32, sum over all `tokens` of |x|. Either may have been left out, and is then zero.
    """

    columns: int
    gram: torch.Tensor
    absolute: torch.Tensor
    tokens: int = 0
    sampled: int = 0
    readers: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> Inputs:
        """Before the first token."""
        return cls(
            columns,
            torch.zeros(columns, columns, device=device),
            torch.zeros(columns, device=device),
        )

    def add(self, x: torch.Tensor, every: int) -> None:
        """Take up tokens x (..., columns); the Gram matrix takes each `every`-th of them."""
        self.add_absolute(x)
        self.add_products(x, every)

    def add_absolute(self, x: torch.Tensor) -> None:
        """Take up tokens x (..., columns) in the sum of |x|."""
        rows = x.reshape(-1, self.columns)
        self.tokens += len(rows)
        self.absolute += rows.abs().sum(dim=0, dtype=torch.float32)

    def add_products(self, x: torch.Tensor, every: int) -> None:
        """Take up each `every`-th of tokens x (..., columns) in the Gram matrix."""
        picked = x.reshape(-1, self.columns)[::every]
        self.sampled += len(picked)
        add_products(self.gram, picked)

    def complete(self) -> None:
        """Fill the lower triangle, which :func:`add_products` leaves out."""
        upper = torch.triu(self.gram)
        self.gram.copy_(upper + torch.triu(upper, 1).T)


def add_products(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Gram += rowsT rows in float32, the upper triangle of blocks only.

    `rows` (tokens, columns) BF16. Products of BF16 numbers are exact in float32, and sums are
    float32: on a CPU through oneDNN's BF16 products with float32 output (the same numbers rounded
    to BF16 are the numbers themselves), on CUDA through `out_dtype`.
    """
    columns = rows.shape[1]
    width = max(-(-columns // BLOCKS), 256)
    on_cpu = rows.device.type == "cpu"
    factor = rows.float() if on_cpu else rows
    with bf16_products():
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            left, right, target = (
                factor[:, start:stop].T,
                factor[:, start:],
                gram[start:stop, start:],
            )
            if on_cpu:
                target.addmm_(left, right)
            else:
                target += torch.mm(left, right, out_dtype=torch.float32)


@contextmanager
def bf16_products() -> Iterator[None]:
    """Float32 matrix products on a CPU with factors rounded to BF16, where the CPU is fast at it.

    Sums stay in float32. Exact where the factors are BF16 numbers already.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Watch:
    """Collects :class:`Inputs` from a layer's forward passes.

    `grams` names the linears whose Gram matrix is needed, `means` the modules of which the mean |x|
    is (the first linear behind a norm, a router). `observe` is called with every watched module and
    its input as well: static activation scales come from it.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        grams: Iterable[str],
        means: Iterable[str] = (),
        every: int = 1,
        observe: Callable[[torch.nn.Module, torch.Tensor], None] | None = None,
    ) -> None:
        self._layer, self._every, self._observe = layer, every, observe
        self._grams, self._means = frozenset(grams), frozenset(means)
        self._taken: set[str] = set()  # of the input seen last
        self.inputs: dict[str, Inputs] = {}  # by the first linear that reads it
        self._first_reader: dict[str, str] = {}
        self._order: list[str] = []
        self._last: str | None = None
        self._seen: torch.Tensor | None = None
        self._seen_by = ""

    def of(self, name: str) -> Inputs | None:
        """The input statistics of a linear; None if it was never called."""
        first = self._first_reader.get(name)
        return self.inputs.get(first) if first is not None else None

    @contextmanager
    def hooked(self, stop_early: bool) -> Iterator[None]:
        """Watch the layer's calls; with `stop_early` they end in :class:`LayerEnds`."""
        handles = []
        for name in sorted(self._grams | self._means):
            module = self._layer.get_submodule(name)
            hook = self._hook(name, stop_early)
            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_of_pass(self) -> None:
        """Call after each forward: the first one has shown the order of the linears."""
        self._last = self._order[-1] if self._order else None
        self._seen = None

    def _hook(self, name: str, stop_early: bool) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if self._last is None and name not in self._order:
                self._order.append(name)
            if self._seen is not x:
                self._seen, self._seen_by = x, self._first_reader.get(name, name)
                self._taken.clear()
                if self._seen_by not in self.inputs:
                    self.inputs[self._seen_by] = Inputs.empty(x.shape[-1], x.device)
            if name in self._grams and "gram" not in self._taken:
                self._taken.add("gram")
                self.inputs[self._seen_by].add_products(x, self._every)
            if name in self._means and "mean" not in self._taken:
                self._taken.add("mean")
                self.inputs[self._seen_by].add_absolute(x)
            if name not in self._first_reader:
                self._first_reader[name] = self._seen_by
                self.inputs[self._seen_by].readers.append(name)
            if self._observe is not None:
                self._observe(module, x)
            if stop_early and name == self._last:
                raise LayerEnds

        return hook
