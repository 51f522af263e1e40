"""Held-out text scored by a server's library, where the server itself scores no prompt.

The windows are those that the server's tokenizer cuts, and the arrays that come of it are the same
as a server's. That library and server compute the same is seen, not assumed: both continue the
beginnings of some windows greedily, and the record says how far they agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from quantize.errors import ToolError
from quantize.measure.client import ScoredPrompt
from quantize.measure.dialects import LlamaCppClient
from quantize.measure.perplexity import OnProgress, Window
from quantize.measure.serving import Running
from quantize.records import Agreement
from quantize.servers.base import gguf_file
from quantize.stages.base import StageContext

BEGINNINGS = 8
"""Windows whose beginnings are continued, spread over the text."""
BEGINNING_TOKENS = 32
CONTINUED_TOKENS = 16
LARGEST_DIFFERENCE_NATS = 0.1
"""Of the first token's log-probability. Kernels round otherwise for one token than for many, by
some thousandths; another model, tokenizer or BOS differs by more than this."""


class LibraryScorer:
    """Scores windows by the worker `SCORER` of the running server; `agreement` is known then."""

    def __init__(self, context: StageContext, running: Running, name: str) -> None:
        self._context, self._running, self._name = context, running, name
        self.agreement: Agreement | None = None

    def __call__(
        self, windows: Sequence[Window], top_k: int, on_progress: OnProgress
    ) -> Iterator[ScoredPrompt]:
        """See :data:`quantize.measure.perplexity.Scorer`; the worker reports its progress."""
        beginnings = chosen(windows)
        result, output = self._run(windows, top_k, beginnings)
        self.agreement = self._compare(beginnings, result["continued"], str(result["version"]))
        yield from read(output, windows)

    def _run(
        self, windows: Sequence[Window], top_k: int, beginnings: Sequence[Sequence[int]]
    ) -> tuple[dict[str, object], Path]:
        context, running = self._context, self._running
        backend, launch = running.backend, running.launch
        assert launch is not None, "a library has a file to read"
        assert backend.SCORER is not None, "only such a server has a library"
        assert backend.ENVIRONMENT is not None, "a library lies in an environment"
        given = context.work / f"{self._name}.windows.npz"
        output = context.work / f"{self._name}.scores.npz"
        write(given, windows)
        body = {
            "model": str(gguf_file(launch.model)),
            "windows": str(given),
            "top_k": top_k,
            "output": str(output),
            "threads": len(os.sched_getaffinity(0)),
            "gpu_layers": -1 if launch.accelerator == "cuda" else 0,
            "continued": beginnings,
            "count": CONTINUED_TOKENS,
        }
        label = f"{context.entry.id}-{self._name}"
        result = context.runner.worker(
            *(backend.ENVIRONMENT, backend.SCORER, body),
            work=context.work,
            label=label,
            env=backend.variables(launch),
        )
        return result, output

    def _compare(
        self, beginnings: Sequence[Sequence[int]], continued: object, version: str
    ) -> Agreement:
        """What the server says to the same beginnings; a ToolError if it is another model."""
        client = self._running.client
        assert isinstance(client, LlamaCppClient), "no other server has a library yet"
        assert isinstance(continued, list), "the worker's result"
        equal, count, differences = 0, 0, []
        for tokens, library in zip(beginnings, continued, strict=True):
            made, logprob = client.go_on(tokens, CONTINUED_TOKENS)
            equal += common(made, library["tokens"])
            count += max(len(made), len(library["tokens"]))
            differences.append(abs(logprob - float(library["logprob"])))
        largest = max(differences)
        if largest > LARGEST_DIFFERENCE_NATS:
            raise ToolError(
                "llama.cpp's server and library give the same token log-probabilities "
                f"{largest:.3f} nats apart: they do not compute the same model",
                "look whether serve.extra_args changes what the server computes",
            )
        return {
            "library": f"llama-cpp-python {version}",
            "continuations": len(beginnings),
            "tokens": count,
            "tokens_equal": equal,
            "largest_difference_nats": largest,
        }


def chosen(windows: Sequence[Window]) -> list[list[int]]:
    """The beginnings of some windows, evenly spread."""
    step = max(len(windows) // BEGINNINGS, 1)
    return [list(window.tokens[:BEGINNING_TOKENS]) for window in windows[::step][:BEGINNINGS]]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs: what follows has another beginning."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return number
    return min(len(one), len(other))


def write(path: Path, windows: Sequence[Window]) -> None:
    """The windows as the worker reads them."""
    lengths = [len(window.tokens) for window in windows]
    tokens = np.concatenate([np.asarray(window.tokens, np.int32) for window in windows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with path.open("wb") as file:
        np.savez(file, tokens=tokens, offsets=offsets)


def read(path: Path, windows: Sequence[Window]) -> Iterator[ScoredPrompt]:
    """What the worker wrote, a window at a time; where a token is impossible, a ToolError."""
    stored = np.load(path)
    logprobs, ids, best = stored["logprobs"], stored["top_ids"], stored["top_logprobs"]
    if not np.isfinite(logprobs).all():
        raise ToolError(
            "llama.cpp gives a token of the text a probability of zero",
            "its perplexity is infinite: look for damaged weights",
        )
    row = 0
    for window in windows:
        rows = slice(row, row + len(window.tokens) - 1)
        top = [
            [(int(t), float(value)) for t, value in zip(tokens, values, strict=True) if t >= 0]
            for tokens, values in zip(ids[rows], best[rows], strict=True)
        ]
        yield ScoredPrompt([float(value) for value in logprobs[rows]], top)
        row = rows.stop
