"""Does the tokenizer fit the model's vocabulary? From its files alone, without running it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.checkpoint import EMBEDDING, Checkpoint
from quantize.errors import SourceError
from quantize.findings import Finding, Told
from quantize.model_files import chat_template, read_json_object, special_tokens
from quantize.printable import shortened

PIECES_LIMIT_BYTES = 64 << 20
"""A SentencePiece model of a million pieces takes 18 MB; what is longer than this is not read."""

USED = frozenset({"bos_token", "eos_token", "unk_token"})
"""Special tokens that a model meets when it reads or writes text."""

WHOLE = re.compile("[0-9]{1,18}")

TOGETHER = "take the tokenizer files and the weights from the same commit"


@dataclass
class Vocabulary:
    """Tokens by id, apart: those of ordinary text, and those that were added to it."""

    file: str
    base: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)

    def id_of(self, token: str) -> int | None:
        """The id under which a token is known."""
        return self.added.get(token, self.base.get(token))


def check_tokenizer(checkpoint: Checkpoint) -> Told:
    """Ids beyond the embedding, ids given twice, special tokens that are not there."""
    told = Told()
    rows = embedding_rows(checkpoint)
    if rows is None:
        told.notes.append("the embedding is not known by its name: token ids are not checked")
        return told
    _check_end(checkpoint, rows, told)
    try:
        vocabulary = read_vocabulary(checkpoint.folder, told)
        if vocabulary is not None:
            vocabulary.added = _decoder_tokens(checkpoint.folder) | vocabulary.added
            _check_ids(checkpoint, vocabulary, rows, told)
            _check_named(checkpoint.folder, vocabulary, rows, told)
    except SourceError as error:
        told.findings.append(Finding.of(error))
    return told


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding matrix: every id must be below."""
    rows = [
        info.shape[0]
        for name, info in checkpoint.tensors.items()
        if name.endswith(("embed_tokens.weight", "wte.weight"))
        and EMBEDDING.search(name)
        and len(info.shape) == 2
    ]
    return max(rows, default=None)


def read_vocabulary(folder: Path, told: Told) -> Vocabulary | None:
    """tokenizer.json, or vocab.json with added_tokens.json, or the pieces of tokenizer.model."""
    for name in ("tokenizer.json", "vocab.json", "tokenizer.model"):
        path = folder / name
        if not path.is_file():
            continue
        if name == "tokenizer.json":
            return _fast(path)
        if name == "vocab.json":
            base = read_json_object(path)
        else:
            size = path.stat().st_size
            if size > PIECES_LIMIT_BYTES:
                told.notes.append(f"{name} has {size} bytes: its token ids are not checked")
                return None
            count = count_pieces(path.read_bytes())
            base = {f"piece {number}": number for number in range(count)}
        added = folder / "added_tokens.json"
        return Vocabulary(
            name,
            _whole(base, path),
            _whole(read_json_object(added), added) if added.is_file() else {},
        )
    return None


def _fast(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json: an object (BPE, WordPiece) or a list (Unigram)."""
    stated = read_json_object(path)
    model = stated.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # [token, score] by id
        base = {
            str(entry[0]): number
            for number, entry in enumerate(vocab)
            if isinstance(entry, list) and entry
        }
    elif isinstance(vocab, dict):
        base = _whole(vocab, path)
    else:
        raise SourceError(f"{path} has no model.vocab", "download or save the tokenizer again")
    listed = stated.get("added_tokens")
    added = {
        str(token.get("content")): token.get("id")
        for token in (listed if isinstance(listed, list) else ())
        if isinstance(token, dict)
    }
    return Vocabulary(path.name, base, _whole(added, path))


def _decoder_tokens(folder: Path) -> dict[str, int]:
    """Added tokens that tokenizer_config.json lists by id, as older tokenizers keep them."""
    path = folder / "tokenizer_config.json"
    stated = read_json_object(path).get("added_tokens_decoder") if path.is_file() else None
    return {
        str(token["content"]): int(number)
        for number, token in (stated.items() if isinstance(stated, dict) else ())
        if WHOLE.fullmatch(number) and isinstance(token, dict) and "content" in token
    }


def _whole(tokens: Mapping[str, Any], path: Path) -> dict[str, int]:
    for token, number in tokens.items():
        if type(number) is not int or number < 0:
            raise SourceError(
                f"{path} gives {_shown(token)} the id {_shown(number)}", "replace the file"
            )
    return dict(tokens)


def count_pieces(model: bytes) -> int:
    """Pieces of a SentencePiece model: the entries of field 1 of its protocol buffer.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto (ModelProto)
    """
    count = position = 0
    while position < len(model):
        key, position = _varint(model, position)
        match key & 7:
            case 0:
                _, position = _varint(model, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(model, position)
                position += length
                count += key >> 3 == 1
            case 5:
                position += 4
            case _:
                raise _no_model()
    if position != len(model) or not count:
        raise _no_model()
    return count


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        octet = data[position]
        value |= (octet & 127) << shift
        position, shift = position + 1, shift + 7
        if octet < 128:
            return value, position
    raise _no_model()


def _no_model() -> SourceError:
    return SourceError("tokenizer.model is no SentencePiece model", "download it again")


def _check_ids(checkpoint: Checkpoint, vocabulary: Vocabulary, rows: int, told: Told) -> None:
    """Ordinary text must not lead beyond the embedding; an added token may, if nothing uses it."""
    beyond = [token for token, number in vocabulary.base.items() if number >= rows]
    own = [token for token in beyond if token not in vocabulary.added]
    if own:
        told.findings.append(
            Finding(
                f"{vocabulary.file} has {_named(own, vocabulary.base)}, and the embedding has "
                f"{rows} rows (vocab_size): such a token has none",
                TOGETHER,
            )
        )
    if twice := _twice(vocabulary.base):
        first, second = twice
        told.findings.append(
            Finding(
                f"{vocabulary.file} gives {_shown(first)} and {_shown(second)} the same id "
                f"{vocabulary.base[first]}",
                "download or save the tokenizer again",
            )
        )
    outside = {token: n for token, n in vocabulary.added.items() if n >= rows}
    template = chat_template(checkpoint.folder) or ""
    used = [token for token in outside if token in template]
    if used:
        told.findings.append(
            Finding(
                f"the chat template uses {_named(used, outside)}, and the embedding has {rows} "
                "rows (vocab_size): it was not resized when the token was added",
                TOGETHER + ", with resize_token_embeddings before it was trained",
            )
        )
    elif outside:
        told.notes.append(
            f"{vocabulary.file} adds {_named(list(outside), outside)} beyond the {rows} rows of "
            "the embedding: a text with such a token cannot be read"
        )


def _check_named(folder: Path, vocabulary: Vocabulary, rows: int, told: Told) -> None:
    """Special tokens that the tokenizer's config names."""
    for name, token in special_tokens(folder).items():
        number = vocabulary.id_of(token)
        if number is not None and number >= rows and name in USED:
            told.findings.append(
                Finding(
                    f"{name} {_shown(token)} has the id {number}, and the embedding has {rows} "
                    "rows",
                    TOGETHER,
                )
            )
        elif number is None and vocabulary.file != "tokenizer.model":
            told.notes.append(
                f"{name} {_shown(token)} is not in {vocabulary.file}: transformers adds it as a "
                "new token, which the model has not seen"
            )


def _check_end(checkpoint: Checkpoint, rows: int, told: Told) -> None:
    """bos, eos and pad ids of config.json and generation_config.json lie below the rows.

    Where no eos id does, generation never ends. A negative one means none.
    """
    path = checkpoint.folder / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    for file, stated in (
        ("config.json", checkpoint.text_config),
        ("generation_config.json", generation),
    ):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = _ids(stated.get(key))
            if not any(number >= rows for number in ids):
                continue
            said = f"{file}: {key} is {_shown(stated[key])}, and the vocabulary has {rows} ids"
            in_effect = file == "generation_config.json" or "eos_token_id" not in generation
            if key == "eos_token_id" and in_effect and all(number >= rows for number in ids):
                hint = "set it to the id of the token that ends an answer"
                told.findings.append(Finding(f"{said}: generation would never end", hint))
            else:
                told.notes.append(said)


def _ids(value: Any) -> list[int]:
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def _twice(tokens: Mapping[str, int]) -> tuple[str, str] | None:
    """Two tokens with one id."""
    seen: dict[int, str] = {}
    for token, number in tokens.items():
        if number in seen:
            return seen[number], token
        seen[number] = token
    return None


def _shown(value: Any) -> str:
    return shortened(repr(value))


def _named(tokens: list[str], ids: Mapping[str, int]) -> str:
    more = f" and {len(tokens) - 1} more" if tokens[1:] else ""
    return f"the token {_shown(tokens[0])} with the id {ids[tokens[0]]}{more}"
