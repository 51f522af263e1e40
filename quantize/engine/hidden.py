"""Hidden states between two layers: a file, so that memory does not grow with the calibration set.

All sequences stand one after another, longest first, in BF16: `tokens * hidden_size * 2` bytes. A
batch is a run of sequences of equal length, so it is one contiguous piece of the file, there is no
padding, and a position in the file does not depend on how many processes share the work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """The hidden states in front of one layer, (tokens, hidden_size) BF16: a file.

    With `hold`, what is written also stays on the device, and is read from there. Then the file
    only serves a killed run to go on from, and without `on_disk` there is none.
    """

    def __init__(
        self,
        path: Path,
        hidden_size: int,
        device: torch.device,
        hold: bool = False,
        on_disk: bool = True,
    ) -> None:
        self.path, self.hidden_size, self.device = path, hidden_size, device
        self.on_disk = on_disk
        self._row = hidden_size * ITEM_BYTES
        self._held: dict[int, torch.Tensor] | None = {} if hold else None

    def complete(self, tokens: int) -> bool:
        """Whether the file is there; it is renamed into place when it is whole."""
        return self.path.is_file() and self.path.stat().st_size == tokens * self._row

    def read_ahead(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with its states; the next ones are read while the caller computes."""
        with self.reading() as read, ThreadPoolExecutor(1, "read-ahead") as pool:
            waiting = deque(pool.submit(read, batch) for batch in batches[:1])
            for number, batch in enumerate(batches):
                if number + 1 < len(batches):
                    waiting.append(pool.submit(read, batches[number + 1]))
                yield batch, waiting.popleft().result()

    @contextmanager
    def reading(self) -> Iterator[Callable[[Batch], torch.Tensor]]:
        """A function batch → (count, length, hidden_size) on the device."""
        if not self.on_disk:
            yield self._read_held
            return
        with open(self.path, "rb", buffering=0) as file:

            def read(batch: Batch) -> torch.Tensor:
                held = self._held.get(batch.start) if self._held else None
                if held is not None and len(held) == batch.count:
                    return held
                pinned = self.device.type == "cuda"  # so that the copy need not be waited for
                shape = (batch.count, batch.length, self.hidden_size)
                states = torch.empty(shape, dtype=DTYPE, pin_memory=pinned)
                view, done = memoryview(states.view(torch.uint8).numpy()).cast("B"), 0
                while done < len(view):
                    done += os.preadv(file.fileno(), [view[done:]], batch.start * self._row + done)
                return states.to(self.device, non_blocking=True)

            yield read

    def _read_held(self, batch: Batch) -> torch.Tensor:
        """A batch of what is held; it may end within one of those that were written."""
        assert self._held is not None
        states = self._held[batch.start]
        while len(states) < batch.count:
            following = self._held[batch.start + len(states) * batch.length]
            states = torch.cat([states, following])
        return states[: batch.count]

    @contextmanager
    def writing(self) -> Iterator[Callable[[Batch, torch.Tensor], None]]:
        """A function that takes a batch's states; the file is synced at the end.

        Writing goes on behind the caller's back, a batch at most. Several processes may write
        their own batches at once. When all have, one of them calls :meth:`finish`.
        """
        if not self.on_disk:
            yield self._hold
            return
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            with ThreadPoolExecutor(1, "write-behind") as pool:
                pending: deque[Future[None]] = deque()

                def write(batch: Batch, states: torch.Tensor) -> None:
                    self._hold(batch, states)
                    pending.append(pool.submit(self._write, descriptor, batch, states))
                    if len(pending) > 1:
                        pending.popleft().result()

                yield write
                for last in pending:
                    last.result()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _hold(self, batch: Batch, states: torch.Tensor) -> None:
        if self._held is not None:
            self._held[batch.start] = states.to(DTYPE)

    def _write(self, descriptor: int, batch: Batch, states: torch.Tensor) -> None:
        # Torch keeps pinned memory and hands it out again. Memory that is new each time came off
        # an H200 at 1.3 GB/s: its pages are made on the way.
        pinned = self.device.type == "cuda"
        data = torch.empty(states.shape, dtype=DTYPE, pin_memory=pinned).copy_(states)
        view, done = memoryview(data.view(torch.uint8).numpy()).cast("B"), 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], batch.start * self._row + done)

    def finish(self) -> None:
        """Give the written file its name."""
        if self.on_disk:
            os.replace(self._temporary, self.path)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def release(self) -> None:
        """Forget what is held."""
        self._held = None

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)


def fits(tokens: int, hidden_size: int, device: torch.device) -> bool:
    """Whether two of these may stay on the device: in a quarter of a GPU's free memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bool(2 * tokens * hidden_size * ITEM_BYTES <= free // 4)
