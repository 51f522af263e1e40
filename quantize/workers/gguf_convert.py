"""A checkpoint as a BF16 GGUF file, by llama.cpp's converter, after a look at its tokenizer.

Runs in the llamacpp environment. The tokenizer comes first: it takes seconds, and what llama.cpp
reads otherwise than transformers would make a model that answers nonsense.

Request body: `model` (source folder), `output` (the file), `name` (what the file calls the model),
`weight_bytes` (of the source's tensors, for progress).
Result body: `tokenizer` ({"texts", "tokens": compared, "special_tokens": of them, "chats"}),
`seconds` ({"tokenizer", "convert"}), `peak_memory_bytes`, `versions`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from transformers import AutoTokenizer

from quantize.protocol import Events, Request, WorkerError, worker_main
from quantize.workers.llamacpp import Vocabulary, peak_memory_bytes, versions
from quantize.workers.odd_texts import WORDS

CHATS = (
    [{"role": "user", "content": "Where does the ferry cross?"}],
    [
        {"role": "user", "content": "Where does the ferry cross?"},
        {"role": "assistant", "content": "At the weir.\n\n  Twice a day 🚢"},
        {"role": "user", "content": " And in winter? "},
    ],
)
NEAR = 3
"""Tokens on either side of the first difference that an error shows."""


def run(request: Request, events: Events) -> dict[str, Any]:
    """Compare the tokenizers, convert, move the complete file to its place."""
    body = request.body
    source, output = Path(body["model"]), Path(body["output"])
    started = time.monotonic()
    events.progress("comparing the tokenizers", 0, 1)
    vocabulary = Path(request.work, "vocabulary.gguf")
    with torch.inference_mode():
        with _refusals():
            _model(source, vocabulary, body["name"]).write_vocab()
        compared = compare_tokenizers(source, Vocabulary(vocabulary))
        tokenized = time.monotonic()
        part = output.with_suffix(".part")
        with _Growth(part, body["weight_bytes"], events), _refusals():
            _model(source, part, body["name"]).write()
    part.replace(output)
    return {
        "tokenizer": compared,
        "seconds": {"tokenizer": tokenized - started, "convert": time.monotonic() - tokenized},
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }


@contextmanager
def _refusals() -> Iterator[None]:
    """What the converter does not implement is a fault of the source."""
    try:
        yield
    except (NotImplementedError, FileNotFoundError, KeyError, ValueError) as error:
        raise _unsupported(error) from error


def _model(source: Path, output: Path, name: str) -> Any:
    """The converter for the checkpoint's architecture."""
    parameters = ModelBase.load_hparams(source, False)
    converter = get_model_class(get_model_architecture(parameters, ModelType.TEXT))
    return converter(source, gguf.LlamaFileType.MOSTLY_BF16, output, model_name=name)


def _unsupported(error: Exception) -> WorkerError:
    return WorkerError(
        "SourceError",
        f"llama.cpp's converter does not take this checkpoint: {error}",
        "use another format (quantize.format), or a checkpoint whose tokenizer is the one that its "
        "model family was published with",
    )


def compare_tokenizers(source: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """How much was compared; SourceError at the first text that the two read differently."""
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    special = [str(token) for token in tokenizer.all_special_tokens]
    added = [str(token) for token in tokenizer.get_added_vocab()]
    texts = [
        *WORDS,
        *(f"one {token} two{token}{token}" for token in dict.fromkeys(special + added)),
    ]
    tokens = 0
    for text in texts:
        theirs = list(tokenizer(text)["input_ids"])
        tokens += _compare(text, theirs, vocabulary.ids(text, add_special=True), tokenizer)
    chats = list(_chats(tokenizer))
    for text in chats:
        theirs = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        tokens += _compare(text, theirs, vocabulary.ids(text, add_special=False), tokenizer)
    return {
        "texts": len(texts) + len(chats),
        "tokens": tokens,
        "special_tokens": len(set(special)),
        "chats": len(chats),
    }


def _chats(tokenizer: Any) -> Iterator[str]:
    if not tokenizer.chat_template:
        return
    for messages in CHATS:
        try:
            yield str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # templates are programs; the checklist has tried them
            print(f"a chat is not compared: {error}")


def _compare(text: str, theirs: list[int], ours: list[int], tokenizer: Any) -> int:
    if theirs == ours:
        return len(ours)
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
        min(len(theirs), len(ours)),
    )
    shown = [
        ", ".join(
            f"{token} {tokenizer.convert_ids_to_tokens(token)!r}"
            for token in ids[max(at - NEAR, 0) : at + NEAR]
        )
        for ids in (theirs, ours)
    ]
    raise WorkerError(
        "SourceError",
        f"llama.cpp tokenizes otherwise than transformers: {text[:120]!r} differs from token "
        f"{at + 1} on:\n  transformers: {shown[0]}\n  llama.cpp:    {shown[1]}",
        "the GGUF file would answer other questions than were asked: compare tokenizer.json, "
        "tokenizer.model and added tokens with those of the model that was fine-tuned, or use "
        "another format",
    )


class _Growth:
    """Tells how large a file has become, while the converter writes it."""

    def __init__(self, path: Path, total: int, events: Events) -> None:
        self._path, self._total, self._events = path, total, events
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            size = self._path.stat().st_size if self._path.exists() else 0
            done = min(size, self._total)
            self._events.progress("writing BF16 GGUF", done / 1e9, self._total / 1e9, "GB")


if __name__ == "__main__":
    worker_main(run)
