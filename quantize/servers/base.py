"""What a server backend offers; one file per server, in the literal table `SERVERS`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantize.errors import SourceError

if TYPE_CHECKING:
    from quantize.measure.client import Client
    from quantize.serving import Serve

LINE_CHARACTERS = 400
"""Of a line of a log that stands in an error."""

MATRIX = "imatrix.gguf"
"""llama.cpp keeps the importance matrix in its own format, too."""


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

    program: Path  # interpreter of the server's environment, or the server's own executable
    model: Path  # checkpoint folder; of a server that reads GGUF, with exactly one *.gguf
    served_name: str
    port: int
    accelerator: str  # cpu or cuda
    serve: Serve
    max_logprobs: int
    tokenizer: Path | None = None  # another folder's; the model's own if absent
    adapter: ServedAdapter | None = None
    trust_remote_code: bool = False  # the recipe names the code that was read
    context_tokens: int | None = None  # of a request: the recipe's, or those it was trained for
    scratch: Path = Path()  # a folder for what the server writes


class Server(Protocol):
    """A module of this package with these names at its top level.

    `ENVIRONMENT` is one of ours or, for a server that nobody locks here, the name under which the
    recipe gives an interpreter; None where `PROGRAM`, an executable on the PATH, is the server.
    Both are None for a server that is not started at all.
    """

    NAME: str
    ENVIRONMENT: str | None
    PROGRAM: str | None
    INSTALL: str  # what to do where it is not installed
    READS: str  # safetensors or gguf: the format of what is not quantized
    START_SECONDS: float  # one that computes and logs nothing for this long is given up
    COUNTERS: tuple[str, ...]  # of its metrics, kept as they stood at the end
    KV_CACHE: str | None  # pattern in the log: the tokens its KV cache holds, or their factors
    KNOWN_FAILURES: tuple[tuple[str, str | None], ...]  # (pattern in the log, remedy), see explain
    SCORER: str | None  # worker in ENVIRONMENT that scores text where the server cannot

    def command(self, launch: Launch) -> list[str]:
        """The command line."""
        ...

    def variables(self, launch: Launch) -> dict[str, str]:
        """Environment variables it needs."""
        ...

    def client(self, base_url: str, model: str) -> Client:
        """A connection that speaks this server's dialect."""
        ...


def explain(server: Server, log: str) -> tuple[str, str] | None:
    """The line of a server's log that tells why it ended, and what to do about that.

    None for an unknown failure, and for one of the table without a remedy: what is behind that in
    the table would only be its consequence.
    """
    for pattern, remedy in server.KNOWN_FAILURES:
        if found := re.search(pattern, log):
            start, end = log.rfind("\n", 0, found.start()) + 1, log.find("\n", found.end())
            line = log[start : end if end >= 0 else None].strip()
            return (line[-LINE_CHARACTERS:], remedy) if remedy else None
    return None


def kv_cache_tokens(server: Server, log: str) -> int | None:
    """Tokens that the KV cache holds, as the server's log reports it."""
    found = re.search(server.KV_CACHE, log) if server.KV_CACHE else None
    return math.prod(int(part.replace(",", "")) for part in found.groups()) if found else None


def gguf_file(folder: Path) -> Path:
    """The one GGUF file of a folder with weights in it; an importance matrix may lie beside it."""
    found = sorted(path for path in folder.glob("*.gguf") if path.name != MATRIX)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SourceError(
            f"{folder} must hold exactly one .gguf file: {names}", "make the artifact again"
        )
    return found[0]
