"""Hidden states from layer to layer: which are on disk, and what a resumed run goes on from.

Where they are read from a file, every layer's are written, and a kill costs the layer under way.
Where they stay on a GPU the files are only for a killed run; a layer takes a second or two there,
and writing its outputs takes longer. So they are written once in `KEEP_SECONDS`, and the layers
since then are done again: they were finished in that time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from quantize.engine.hidden import HiddenStates, Sequences, fits
from quantize.engine.layer import Flow
from quantize.engine.ranks import Ranks
from quantize.engine.skeleton import DTYPE, Skeleton
from quantize.engine.source import Source

KEEP_SECONDS = 60.0


class Boundaries:
    """The calibration data between the layers of one model.

    Several ranks write every layer's states: each holds its own part, and a kill takes them all.
    """

    def __init__(self, skeleton: Skeleton, sequences: Sequences, work: Path, ranks: Ranks) -> None:
        self._skeleton, self._sequences, self._work, self._ranks = skeleton, sequences, work, ranks
        self._hold = fits(sequences.tokens, skeleton.hidden_size, skeleton.device)
        self._every_layer = ranks.size > 1 or not self._hold
        self._kept = time.monotonic()

    def newest(self, layer: int) -> int:
        """The last layer up to this one whose input is on disk; 0, whose input is embeddings."""
        kept = (index for index in range(layer, 0, -1) if self._complete(index))
        return next(kept, 0)

    def flows(self, layers: range, source: Source) -> Iterator[tuple[int, Flow]]:
        """Each layer's number with its part of the data's way, from :meth:`newest` to the last."""
        before = None
        for index in layers:
            before = before or self._input(index, source)
            after = None
            if index + 1 < layers.stop:
                after = self._at(index + 1, self._hold, on_disk=self._due())
            yield index, Flow(before, after, self._sequences.batches, self._skeleton.calls)
            before = after

    def passed(self, index: int, flow: Flow) -> None:
        """Layer `index` is in the journal: let go of what nothing goes on from any more."""
        flow.before.release()
        if flow.after is None or flow.after.on_disk:
            for earlier in range(index + 1):  # another rank may be writing those behind already
                self._at(earlier).remove()
            self._kept = time.monotonic()

    def _due(self) -> bool:
        return self._every_layer or time.monotonic() - self._kept >= KEEP_SECONDS

    def _at(self, index: int, hold: bool = False, on_disk: bool = True) -> HiddenStates:
        """The input of layer `index`."""
        size, device = self._skeleton.hidden_size, self._skeleton.device
        return HiddenStates(self._work / f"hidden-{index}.bin", size, device, hold, on_disk)

    def _complete(self, index: int) -> bool:
        return self._at(index).complete(self._sequences.tokens)

    def _input(self, first: int, source: Source) -> HiddenStates:
        """What the first of the layers begins with; what is on disk for any other goes."""
        states = self._at(first)
        self._ranks.wait()  # until all have seen what is there
        if self._ranks.first:
            for stale in self._work.glob("hidden-*"):
                if stale != states.path:
                    stale.unlink()
        self._ranks.wait()  # before any of them writes
        if not self._complete(first):
            states = self._at(first, self._hold, on_disk=self._every_layer)
            self._embed(states, source)
        return states

    def _embed(self, states: HiddenStates, source: Source) -> None:
        name = self._skeleton.embedding_name()
        embed = self._skeleton.embedder(source.read([name], DTYPE)[name])
        with states.writing() as write:
            for batch in self._ranks.share(self._sequences.batches):
                write(batch, embed(self._sequences.batch_ids(batch)))
        self._skeleton.drop_embedding()
        self._ranks.wait()
        if self._ranks.first:
            states.finish()
        self._ranks.wait()
