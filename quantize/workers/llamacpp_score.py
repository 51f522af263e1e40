"""Log-probabilities of given tokens by llama.cpp's library, the build that the server is of.

Runs in the llamacpp environment. llama-server gives no log-probabilities of a prompt; the library
computes the logits of every position when it evaluates it.

    log p(token) = logit of the token - log Σ exp(logits of the position), nats, summed in float64

Request body: `model` (GGUF file), `windows` (npz: `tokens` (all tokens,) int32, `offsets`
(windows + 1,) int64), `top_k`, `output` (npz), `threads`, `gpu_layers`, `continued` (lists of token
ids) and `count`. The output has for each token of each window but the first `logprobs` (n,)
float32, `top_ids` (n, top_k) int32 and `top_logprobs` (n, top_k) float32, best first.
Result body: `version`, and `continued`: for each list of ids its greedy continuation by at most
`count` tokens, without one that ends it (`tokens`), and the log-probability of the first of them
(`logprob`). The server gives both, too: by these it is known that they compute the same.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from quantize.protocol import Events, Request, WorkerError, worker_main

BATCH = 512
"""Tokens that are evaluated at once: as many as llama.cpp computes together by itself."""

Logits = npt.NDArray[np.float32]


def run(request: Request, events: Events) -> dict[str, Any]:
    """Score every window, write the arrays, continue the given beginnings."""
    body = request.body
    stored = np.load(body["windows"])
    tokens, offsets = stored["tokens"], stored["offsets"]
    windows = [tokens[start:end] for start, end in itertools.pairwise(offsets)]
    longest = max([len(w) for w in windows] + [len(c) + body["count"] for c in body["continued"]])
    model = Model(body["model"], longest, body["threads"], body["gpu_layers"])
    count, row = sum(len(window) - 1 for window in windows), 0
    logprobs = np.empty(count, np.float32)
    top_ids = np.full((count, body["top_k"]), -1, np.int32)
    top_logprobs = np.full((count, body["top_k"]), -np.inf, np.float32)
    for done, window in enumerate(windows, 1):
        for following, logits in model.read(window):
            size = len(following)
            place = slice(row, row + size)
            scores = log_softmax(logits[:size])
            logprobs[place] = scores[np.arange(size), following]
            ids, best = top(scores, body["top_k"])
            top_ids[place, : ids.shape[1]], top_logprobs[place, : ids.shape[1]] = ids, best
            row += size
        events.progress("held-out text", done, len(windows), "windows")
    continued = [model.go_on(ids, body["count"]) for ids in body["continued"]]
    with open(body["output"], "wb") as file:
        np.savez(file, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)
    return {"version": importlib.metadata.version("llama-cpp-python"), "continued": continued}


class Model:
    """A GGUF file in memory with one sequence; the process's end frees it."""

    def __init__(self, path: str, context_tokens: int, threads: int, gpu_layers: int) -> None:
        llama.llama_backend_init()
        wanted = llama.llama_model_default_params()
        wanted.n_gpu_layers = gpu_layers
        self._model = llama.llama_model_load_from_file(path.encode(), wanted)
        if not self._model:
            raise WorkerError("SourceError", f"llama.cpp does not load {path}", "see the log")
        context = llama.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = context_tokens, BATCH, BATCH
        context.n_threads = context.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            what = f"llama.cpp makes no context of {context_tokens} tokens"
            raise WorkerError("ResourceError", what, "free memory, or shorten the suite's window")
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self._size = llama.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def read(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Logits]]:
        """Evaluate from the start; (tokens that follow (n,), logits (n or n + 1, vocabulary)).

        Of the last piece the last row has nothing that follows. The logits are good until the next.
        """
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), BATCH):
            piece = tokens[start : start + BATCH]
            logits = self._evaluate(piece, start)
            yield tokens[start + 1 : start + 1 + len(piece)], logits

    def go_on(self, tokens: Sequence[int], count: int) -> dict[str, Any]:
        """The greedy continuation, and the log-probability of its first token."""
        for _, logits in self.read(tokens):
            last = logits[-1]
        first = float(log_softmax(last[None])[0].max())
        made: list[int] = []
        while len(made) < count:
            token = int(last.argmax())
            if llama.llama_vocab_is_eog(self._vocabulary, token):
                break
            last = self._evaluate([token], len(tokens) + len(made))[-1]
            made.append(token)
        return {"tokens": made, "logprob": first}

    def _evaluate(self, piece: Sequence[int], position: int) -> Logits:
        """Logits (len(piece), vocabulary) of tokens that stand from `position` on."""
        batch = self._batch
        batch.n_tokens = len(piece)
        for number, token in enumerate(piece):
            batch.token[number], batch.pos[number] = int(token), position + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = 1
        if (code := llama.llama_decode(self._context, batch)) != 0:
            raise WorkerError("ToolError", f"llama_decode failed with {code}", "see the log")
        shape = (len(piece), self._size)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=shape)


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log-probabilities (n, vocabulary), nats; an error where they are not numbers."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    scores: npt.NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    if np.isnan(scores).any():
        raise WorkerError(
            "ToolError",
            "llama.cpp computes log-probabilities that are not numbers",
            "the checkpoint's activations overflow or are NaN: look for damaged weights",
        )
    return scores


def top(scores: npt.NDArray[np.float64], k: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids and log-probabilities (n, at most k) of the most likely tokens, best first."""
    k = min(k, scores.shape[1])
    found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(scores, found, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(values, order, axis=1)


if __name__ == "__main__":
    worker_main(run)
