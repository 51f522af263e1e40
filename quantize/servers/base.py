"""What a server backend offers; one file per server, in the literal table `SERVERS`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantize.recipe import Serve


@dataclass(frozen=True)
class ServedAdapter:
    """A LoRA adapter that requests name instead of its base."""

    name: str
    folder: Path
    rank: int  # the largest of its modules
    targets: tuple[str, ...]  # last parts of its modules' names: q_proj, ...


@dataclass(frozen=True)
class Launch:
    """One server process to be started on the loopback interface."""

    python: Path  # interpreter of the server's environment
    model: Path  # checkpoint folder
    served_name: str
    port: int
    accelerator: str  # cpu or cuda
    serve: Serve
    max_logprobs: int
    tokenizer: Path | None = None  # another folder's; the model's own if absent
    adapter: ServedAdapter | None = None
    trust_remote_code: bool = False  # the recipe names the code that was read


class Server(Protocol):
    """A module of this package with these names at its top level."""

    NAME: str
    ENVIRONMENT: str
    START_SECONDS: float  # one that computes and logs nothing for this long is given up

    def command(self, launch: Launch) -> list[str]:
        """The command line."""
        ...

    def variables(self, launch: Launch) -> dict[str, str]:
        """Environment variables it needs."""
        ...

    def cannot_serve(self, scheme: str, accelerator: str) -> str | None:
        """Why a checkpoint of this scheme is not served here, or None."""
        ...

    def explain(self, log: str) -> str | None:
        """What to do about a failed start, from its log, or None for an unknown failure."""
        ...

    def kv_cache_tokens(self, metrics: dict[str, float], log: str) -> int | None:
        """Tokens that the KV cache holds, as the server reports it."""
        ...
