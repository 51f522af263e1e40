"""Hidden states between two layers: a file, so that memory does not grow with the calibration set.

All sequences stand one after another, longest first, in BF16: `tokens * hidden_size * 2` bytes. A
batch is a run of sequences of equal length, so it is one contiguous piece of the file, there is no
padding, and a position in the file does not depend on how many processes share the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

DTYPE = torch.bfloat16
ITEM_BYTES = 2

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens run through a layer at once, by device; a longer sequence is a batch of its own."""


@dataclass(frozen=True)
class Batch:
    """`count` sequences of `length` tokens; the first token is number `start` of the file."""

    start: int
    count: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return self.count * self.length


class Sequences:
    """The calibration sequences in file order, and their batches."""

    def __init__(
        self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], batch_tokens: int
    ) -> None:
        lengths = np.diff(offsets)
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        self.ids = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in order]).astype(
            np.int64
        )
        self.batches = tuple(_batches([int(lengths[i]) for i in order], batch_tokens))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.ids)

    def sampled(self, every: int) -> int:
        """Tokens that are left when each `every`-th of every batch is taken."""
        return sum(-(-batch.tokens // every) for batch in self.batches)

    def batch_ids(self, batch: Batch) -> torch.Tensor:
        """Token ids (count, length) int64."""
        ids = self.ids[batch.start : batch.start + batch.tokens]
        return torch.from_numpy(ids).reshape(batch.count, batch.length)


def _batches(lengths: list[int], limit: int) -> Iterator[Batch]:
    start = index = 0
    while index < len(lengths):
        length = lengths[index]
        count = 1
        while (
            index + count < len(lengths)
            and lengths[index + count] == length
            and (count + 1) * length <= limit
        ):
            count += 1
        yield Batch(start, count, length)
        start += count * length
        index += count


class HiddenStates:
    """One file of hidden states, (tokens, hidden_size) BF16."""

    def __init__(self, path: Path, hidden_size: int, device: torch.device) -> None:
        self.path, self.hidden_size, self.device = path, hidden_size, device
        self._row = hidden_size * ITEM_BYTES

    def complete(self, tokens: int) -> bool:
        """Whether the file is there; it is renamed into place when it is whole."""
        return self.path.is_file() and self.path.stat().st_size == tokens * self._row

    @contextmanager
    def reading(self) -> Iterator[Callable[[Batch], torch.Tensor]]:
        """A function batch → (count, length, hidden_size) on the device."""
        with open(self.path, "rb", buffering=0) as file:

            def read(batch: Batch) -> torch.Tensor:
                data = bytearray(batch.tokens * self._row)
                view, done = memoryview(data), 0
                while done < len(data):
                    done += os.preadv(file.fileno(), [view[done:]], batch.start * self._row + done)
                flat = torch.frombuffer(data, dtype=DTYPE)
                return flat.reshape(batch.count, batch.length, -1).to(self.device)

            yield read

    @contextmanager
    def writing(self) -> Iterator[Callable[[Batch, torch.Tensor], None]]:
        """A function that puts a batch's states into the file; it is synced at the end.

        Several processes may write their own batches at once. When all have, one of them calls
        :meth:`finish`.
        """
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT, 0o644)
        try:

            def write(batch: Batch, states: torch.Tensor) -> None:
                data = states.to("cpu", DTYPE).contiguous().view(torch.uint8).numpy().data
                view, done = memoryview(data).cast("B"), 0
                while done < len(view):
                    done += os.pwrite(descriptor, view[done:], batch.start * self._row + done)

            yield write
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Give the written file its name."""
        os.replace(self._temporary, self.path)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)
