"""Held-out text: log-probabilities per token, for perplexity and KL.

Each document is cut into windows of its own: BOS (where the tokenizer adds one) and up to
`window - 1` tokens; without BOS the first token is context only. Without a stride windows do not
overlap. With one, a window scores only what no earlier window has: every token is scored once, in
the first window that holds it, which is the one with the most context.

    perplexity = exp(-Σ log p(token | window so far) / scored tokens)

`bos: once` is the literature's WikiText-2, as in the scripts of GPTQ (arXiv:2210.17323, `llama.py`)
and AWQ (arXiv:2306.00978, `entry.py`): the rows joined by blank lines are tokenized as one text,
BOS stands at its start alone, and what is left after the last whole window is not scored. They
average over windows of equal length, which is the same number.

lm-evaluation-harness' `word_perplexity` normalises the same sum by words instead of tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.errors import SourceError, ToolError
from quantize.keys import digest, file_sha256
from quantize.measure.client import Client, ScoredPrompt
from quantize.printable import shortened
from quantize.records import Dataset, Perplexity
from quantize.suite import PerplexityText
from quantize.untrusted import HELD_OUT_LIMIT_BYTES, read_bytes, read_text
from quantize.workers.rows import HALF_CHARACTER, has_half_character

BOM = b"\xef\xbb\xbf"

MAX_NATS = 700.0
"""exp() of more overflows; a uniform guess among a million tokens costs 14."""


@dataclass(frozen=True)
class Window:
    """Token ids that are sent in one request; those before `first` are context only."""

    document: int
    tokens: tuple[int, ...]
    first: int = 1


OnProgress = Callable[[int, int], None]
Scorer = Callable[[Sequence[Window], int, OnProgress], Iterable[ScoredPrompt]]
"""Scores whole windows, with so many of the most likely tokens at each position, in order."""


def through(client: Client, concurrency: int) -> Scorer:
    """The server itself scores, a request a window, so many at once."""

    def score(
        windows: Sequence[Window], top_k: int, on_progress: OnProgress
    ) -> Iterator[ScoredPrompt]:
        with ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(client.score, window.tokens, top_k) for window in windows]
            try:
                for done, future in enumerate(futures, 1):
                    yield future.result()
                    on_progress(done, len(windows))
            except BaseException:  # also when interrupted: what waits is not asked any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return score


def measure(
    client: Client,
    text: PerplexityText,
    path: Path,
    output: Path,
    score: Scorer,
    on_progress: OnProgress,
) -> Perplexity:
    """Score the text, write the per-token arrays to `output` (npz), return the record.

    The server's tokenizer cuts the windows, whoever scores them.
    """
    documents = read_documents(path, text.field)
    if text.join:
        documents = ["\n\n".join(documents)]
    windows, bos = cut(client, documents, text)
    whole = score(windows, text.top_k, on_progress)
    scored = [_new(prompt, window.first) for prompt, window in zip(whole, windows, strict=True)]
    _save(output, windows, scored, text.top_k)
    _save_documents(output.with_suffix(".jsonl"), documents, windows)
    total_nats = -math.fsum(value for prompt in scored for value in prompt.logprobs)
    tokens = sum(len(prompt.logprobs) for prompt in scored)
    if total_nats / tokens > MAX_NATS:
        raise ToolError(
            f"the held-out text costs {total_nats / tokens:.0f} nats a token",
            "no language model is as bad as that: look for damaged weights",
        )
    local = path.name == Path(text.text).name
    found: Perplexity = {
        "text": path.name if local else text.text,
        "text_sha256": file_sha256(path),
        "tokens_sha256": digest([[w.document, w.first, *w.tokens] for w in windows]),
        "documents": len({window.document for window in windows}),
        "windows": len(windows),
        "window": text.window,
        "stride": _stride(text, len(bos)),
        "joined": text.join,
        "bos": bool(bos),
        "excluded": _excluded(text, len(bos)),
        "top_k": text.top_k,
        "scored_tokens": tokens,
        "total_nats": total_nats,
        "perplexity": math.exp(total_nats / tokens),
    }
    if not local:
        found["dataset"] = _dataset(text)
    return found


def _dataset(text: PerplexityText) -> Dataset:
    """The Hub data set that a text is a column of."""
    found: Dataset = {"path": text.text, "split": text.split}
    if text.config is not None:
        found["config"] = text.config
    return found


def _save_documents(output: Path, documents: Sequence[str], windows: Sequence[Window]) -> None:
    """The texts that were scored, a line each: what calibration data must not overlap with."""
    scored = sorted({window.document for window in windows})
    rows = ({"document": number, "text": documents[number]} for number in scored)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output.write_text(lines, encoding="utf-8")


def read_documents(path: Path, field: str) -> list[str]:
    """The `field` of a .jsonl file's rows, or a .txt file as one document."""
    if path.suffix != ".jsonl":
        return [_readable(read_text(path, HELD_OUT_LIMIT_BYTES), str(path))]
    documents = []
    # Lines end at a line feed alone: JSON strings may hold the other separators that Unicode has.
    for number, line in enumerate(read_bytes(path, HELD_OUT_LIMIT_BYTES).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.removeprefix(BOM))[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(
                f"{path}:{number}: not an object with `{field}`: {shortened(repr(error))}",
                "each line is one JSON object",
            ) from error
        if not isinstance(text, str):
            raise SourceError(
                f"{path}:{number}: `{field}` is {json.dumps(text)[:40]}, not a text",
                "correct the row, or name another column as the text's field",
            )
        documents.append(_readable(text, f"{path}:{number}"))
    return documents


def _readable(text: str, where: str) -> str:
    """The text, which no request could carry if it held half a character."""
    if has_half_character(text):
        raise SourceError(f"{where}: {HALF_CHARACTER}", "correct the row")
    return text


def cut(
    client: Client, documents: Sequence[str], text: PerplexityText
) -> tuple[list[Window], tuple[int, ...]]:
    """Windows of the documents in order, and what the tokenizer puts in front of a text (BOS)."""
    plain = client.tokenize("a", special=False)
    bos = _before(client.tokenize("a", special=True), plain)
    once, size = text.bos == "once", _size(text, len(bos))
    windows: list[Window] = []
    for index, document in enumerate(documents):
        tokens = (*(bos if once else ()), *client.tokenize(document, special=False))
        for start, end, new in _slide(len(tokens), size, _stride(text, len(bos))):
            piece = (*(() if once else bos), *tokens[start:end])
            first = max(new - end + len(piece), 1)
            if first < len(piece) and not (once and len(piece) < size):
                windows.append(Window(index, piece, first))
        if text.windows is not None and len(windows) >= text.windows:
            break
    if not windows:
        raise SourceError("the held-out text has no tokens", "give it documents with text")
    return windows[: text.windows], bos


def _slide(length: int, size: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token that no earlier window has) of the windows over `length` tokens."""
    start = seen = 0
    while seen < length:
        end = min(start + size, length)
        yield start, end, seen
        start, seen = start + step, end


def _size(text: PerplexityText, bos: int) -> int:
    """Tokens of the text in one window."""
    return text.window if text.bos == "once" else text.window - bos


def _stride(text: PerplexityText, bos: int) -> int:
    """Tokens between two windows' starts; never so many that tokens are left out."""
    size = _size(text, bos)
    return min(text.stride or size, size)


def _excluded(text: PerplexityText, bos: int) -> str:
    """Which tokens are not scored, in words."""
    overlap = _stride(text, bos) < _size(text, bos)
    if text.bos == "once":
        where = "text" if overlap else "window"
        stands = ", BOS at the start of the text alone" if bos else ""
        return f"the first token of each {where}{stands}; what is left after the last whole window"
    if bos:
        return "nothing but BOS, which begins each window"
    return f"the first token of each {'document' if overlap else 'window'}; no BOS is added"


def _new(prompt: ScoredPrompt, first: int) -> ScoredPrompt:
    """Of a window, what no earlier one has."""
    return ScoredPrompt(prompt.logprobs[first - 1 :], prompt.top[first - 1 :])


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
            [len(w.tokens) - w.first for w in windows],
        ),
        "token": np.concatenate([np.asarray(w.tokens[w.first :], np.int32) for w in windows]),
        "position": np.concatenate(
            [np.arange(w.first, len(w.tokens), dtype=np.int32) for w in windows]
        ),
        "logprob": np.concatenate([np.asarray(s.logprobs, np.float32) for s in scored]),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }
    with output.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
