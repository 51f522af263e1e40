"""Data-parallel calibration: one process a device, started by torchrun; one process otherwise."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process among its peers. Alone, every method returns at once."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The part of `items` that is dealt to this rank."""
        return list(items[self.rank :: self.size])

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks: the same bits on every rank."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def extend(self, lowest: Iterable[torch.Tensor], highest: Iterable[torch.Tensor]) -> None:
        """Replace tensors by their minimum, and others by their maximum, over the ranks."""
        if self.size > 1:
            for tensor in lowest:
                dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
            for tensor in highest:
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace the tensor by rank `source`'s."""
        if self.size > 1:
            dist.broadcast(tensor, source)

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            dist.barrier()


def join() -> Ranks:
    """Join the peers that torchrun started (it sets RANK, WORLD_SIZE, LOCAL_RANK), or be alone."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(0, 1, device)
    # Rank 0 alone reads and writes the checkpoint; the others may wait for it for long.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(hours=2),
        device_id=device if cuda else None,
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """The end of :func:`join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
