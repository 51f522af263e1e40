"""Held-out text through the server: log-probabilities per token, for perplexity and KL.

Each document is cut into windows of its own: BOS (where the tokenizer adds one) and up to
`window - 1` tokens; without BOS the window's first token is context only. Windows do not overlap,
so every token but the first ones is scored once, with at most `window - 1` tokens of context.

    perplexity = exp(-Σ log p(token | window so far) / scored tokens)

lm-evaluation-harness' `word_perplexity` normalises the same sum by words instead of tokens; the
literature's WikiText-2 figures join all documents before cutting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.errors import SourceError, ToolError
from quantize.keys import digest, file_sha256
from quantize.measure.client import Client, ScoredPrompt
from quantize.records import Perplexity
from quantize.suite import PerplexityText

MAX_NATS = 700.0
"""exp() of more overflows; a uniform guess among a million tokens costs 14."""


@dataclass(frozen=True)
class Window:
    """Token ids that are scored in one request; the first is context only."""

    document: int
    tokens: tuple[int, ...]


def measure(
    client: Client,
    text: PerplexityText,
    path: Path,
    output: Path,
    concurrency: int,
    on_progress: Callable[[int, int], None],
) -> Perplexity:
    """Score the text, write the per-token arrays to `output` (npz), return the record."""
    documents = read_documents(path, text.field)
    if text.join:
        documents = ["\n\n".join(documents)]
    limit = text.windows
    windows, bos = cut(client, documents, text.window, limit)
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(client.score, window.tokens, text.top_k) for window in windows]
        scored = []
        try:
            for done, future in enumerate(futures, 1):
                scored.append(future.result())
                on_progress(done, len(windows))
        except BaseException:  # also when interrupted: the windows that wait are not asked any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _save(output, windows, scored, text.top_k)
    total_nats = -math.fsum(value for prompt in scored for value in prompt.logprobs)
    tokens = sum(len(prompt.logprobs) for prompt in scored)
    if total_nats / tokens > MAX_NATS:
        raise ToolError(
            f"the held-out text costs {total_nats / tokens:.0f} nats a token",
            "no language model is as bad as that: look for damaged weights",
        )
    return {
        "text": path.name if path.name == Path(text.text).name else text.text,
        "text_sha256": file_sha256(path),
        "tokens_sha256": digest([[w.document, *w.tokens] for w in windows]),
        "documents": len({window.document for window in windows}),
        "windows": len(windows),
        "window": text.window,
        "bos": bos,
        "top_k": text.top_k,
        "scored_tokens": tokens,
        "total_nats": total_nats,
        "perplexity": math.exp(total_nats / tokens),
    }


def read_documents(path: Path, field: str) -> list[str]:
    """The `field` of a .jsonl file's rows, or a .txt file as one document."""
    if path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: not UTF-8: {error}", "convert the file to UTF-8") from error
    documents = []
    # Lines end at a line feed alone: JSON strings may hold the other separators that Unicode has.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{path}:{number}: not an object with `{field}`: {error!r}",
                "each line is one JSON object",
            ) from error
        if not isinstance(text, str):
            raise SourceError(
                f"{path}:{number}: `{field}` is {json.dumps(text)[:40]}, not a text",
                "correct the row, or name another column as perplexity.field",
            )
        documents.append(text)
    return documents


def cut(
    client: Client, documents: Sequence[str], window: int, limit: int | None
) -> tuple[list[Window], bool]:
    """Windows of the documents in order, and whether each begins with BOS."""
    plain = client.tokenize("a", special=False)
    special = client.tokenize("a", special=True)
    bos = _before(special, plain)
    step = window - len(bos)
    windows: list[Window] = []
    for index, document in enumerate(documents):
        tokens = client.tokenize(document, special=False)
        for start in range(0, len(tokens), step):
            piece = bos + tuple(tokens[start : start + step])
            if len(piece) > 1:
                windows.append(Window(index, piece))
        if limit is not None and len(windows) >= limit:
            break
    if not windows:
        raise SourceError("the held-out text has no tokens", "give it documents with text")
    return windows[:limit], bool(bos)


def _before(special: list[int], plain: list[int]) -> tuple[int, ...]:
    """What the tokenizer adds in front of a text (it may add an end too)."""
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return tuple(special[:start])
    return ()


def _save(
    output: Path, windows: Sequence[Window], scored: Sequence[ScoredPrompt], top_k: int
) -> None:
    count = sum(len(prompt.logprobs) for prompt in scored)
    top_ids = np.full((count, top_k), -1, np.int32)
    top_logprobs = np.full((count, top_k), -np.inf, np.float32)
    row = 0
    for prompt in scored:
        for best in prompt.top:
            top_ids[row, : len(best)] = [token for token, _ in best]
            top_logprobs[row, : len(best)] = [value for _, value in best]
            row += 1
    arrays = {
        "document": np.repeat(
            np.asarray([w.document for w in windows], np.int32),
            [len(w.tokens) - 1 for w in windows],
        ),
        "token": np.concatenate([np.asarray(w.tokens[1:], np.int32) for w in windows]),
        "logprob": np.concatenate([np.asarray(s.logprobs, np.float32) for s in scored]),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }
    with output.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
