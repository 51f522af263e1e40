"""Hidden states from layer to layer: what is on disk when, and what a stopped run goes on from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantize.engine import boundaries
from quantize.engine.boundaries import Boundaries
from quantize.engine.hidden import Sequences
from quantize.engine.ranks import Ranks

LAYERS, TOKENS, WIDTH = 6, 60, 24
CPU = torch.device("cpu")


class Counting:
    """In the place of the skeleton and the checkpoint: a token's embedding is its id."""

    hidden_size, device, calls, layers = WIDTH, CPU, None, range(LAYERS)

    def __init__(self) -> None:
        self.embedded = 0

    def embedding_name(self) -> str:
        return "embedding"

    def read(self, names: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1, dtype=dtype) for name in names}

    def embedder(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        self.embedded += 1
        return lambda ids: ids[..., None].expand(*ids.shape, WIDTH).to(weight.dtype)

    def drop_embedding(self) -> None:
        """Nothing is kept."""


def sequences() -> Sequences:
    """Twelve of five tokens, three batches."""
    return Sequences(np.arange(TOKENS, dtype=np.int32), np.arange(0, TOKENS + 1, 5), 20)


def passed(model: Counting, work: Path, finished: int, stop: int) -> int:
    """Every layer adds one to its input, up to layer `stop`; the layer that it began with."""
    made = sequences()
    states = Boundaries(model, made, work, Ranks(0, 1, CPU))
    first = states.newest(finished)
    for index, flow in states.flows(range(first, LAYERS), model):
        with flow.before.reading() as read:
            inputs = [read(batch) for batch in flow.batches]
        expected = torch.from_numpy(made.ids).reshape(12, 5, 1).expand(12, 5, WIDTH) + index
        assert torch.equal(torch.cat(inputs).long(), expected), index
        if flow.after is not None:
            with flow.after.writing() as write:
                for batch, given in zip(flow.batches, inputs, strict=True):
                    write(batch, given + 1)
            flow.after.finish()
        if index == stop:  # killed before the layer is in the journal
            break
        of_another_rank = work / f"hidden-{index + 2}.bin.tmp"
        of_another_rank.touch()
        states.passed(index, flow)
        of_another_rank.unlink()  # which is ahead, and must find it
        assert flow.before._held is None, "two layers' states are all that a GPU has room for"
    return first


def kept() -> dict[str, Any]:
    """Stopped in any layer, a run finds what it goes on from, and leaves nothing else at the end.

    On disk are the states of every layer, but where they are held on the device and a file is due
    only once in a while.
    """
    for hold, seconds, every_layer in ((False, 1e9, True), (True, 0.0, True), (True, 1e9, False)):
        for stop in range(LAYERS):
            with tempfile.TemporaryDirectory() as name, _settings(hold, seconds):
                work, model = Path(name), Counting()
                assert passed(model, work, 0, stop) == 0
                assert passed(model, work, stop, LAYERS) == (stop if every_layer else 0)
                from_disk = every_layer and (stop > 0 or not hold)
                assert model.embedded == (1 if from_disk else 2), (hold, seconds, stop)
                assert not list(work.iterdir())
    return {}


def far_apart() -> dict[str, Any]:
    """Files of now and then: the newest before the layer under way is the one that is there."""
    with tempfile.TemporaryDirectory() as name:
        work, model = Path(name), Counting()
        with _settings(hold=True, seconds=0.0):
            passed(model, work, 0, 2)
        with _settings(hold=True, seconds=1e9):
            # The layers behind the second one are in memory alone.
            assert passed(model, work, 2, 4) == 2
            assert [path.name for path in work.iterdir()] == ["hidden-2.bin"]
            assert passed(model, work, 4, LAYERS) == 2
        assert model.embedded == 1
        assert not list(work.iterdir())
    return {}


@contextmanager
def _settings(hold: bool, seconds: float) -> Iterator[None]:
    before = boundaries.fits, boundaries.KEEP_SECONDS
    boundaries.fits, boundaries.KEEP_SECONDS = (lambda *_: hold), seconds
    try:
        yield
    finally:
        boundaries.fits, boundaries.KEEP_SECONDS = before


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "hidden_states_kept": kept,
    "hidden_states_far_apart": far_apart,
}
