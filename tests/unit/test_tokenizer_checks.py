"""Token ids against the embedding, from the tokenizer's files alone."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCABULARY, edit_json, write_checkpoint, write_json

from quantize import tokenizer_checks
from quantize.checkpoint import read_checkpoint
from quantize.findings import Told
from quantize.tokenizer_checks import check_tokenizer, count_pieces
from tests.end_to_end.conftest import ROOT

SPECIAL = {"<s>": 0, "</s>": 2}


def tokenizer(folder: Path, vocab: Any, added: dict[str, int] | None = None) -> Path:
    tokens = [{"id": number, "content": token} for token, number in (added or {}).items()]
    model = {"type": "BPE", "vocab": vocab}
    write_json(folder / "tokenizer.json", {"model": model, "added_tokens": tokens})
    return folder


def words(count: int) -> dict[str, int]:
    return {f"word{number}": number for number in range(count)}


def told(folder: Path) -> Told:
    return check_tokenizer(read_checkpoint(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of 96 rows whose tokenizer has 90 words and two special tokens."""
    made = tokenizer(write_checkpoint(tmp_path / "model"), words(90), {"<s>": 90, "</s>": 91})
    assert told(made) == Told()
    return made


def test_words_beyond_the_embedding(folder: Path) -> None:
    (finding,) = told(tokenizer(folder, words(VOCABULARY + 2), {"</s>": 2})).findings
    assert "the token 'word96' with the id 96 and 1 more" in finding.message
    assert "96 rows" in finding.message
    listed = [[f"word{n}", -float(n)] for n in range(VOCABULARY + 1)]  # Unigram
    (finding,) = told(tokenizer(folder, listed, {"</s>": 2})).findings
    assert "'word96' with the id 96," in finding.message


def test_an_added_token_counts_where_something_uses_it(folder: Path) -> None:
    tokenizer(folder, words(90), {"</s>": 91, "<image>": 96})
    assert told(folder).findings == []
    assert "'<image>' with the id 96 beyond the 96 rows" in told(folder).notes[0]
    edit_json(folder / "tokenizer_config.json", {"chat_template": "<image>{{ messages }}"})
    (finding,) = told(folder).findings
    assert "the chat template uses the token '<image>'" in finding.message
    tokenizer(folder, words(90), {"</s>": 96})  # the eos token itself
    assert "eos_token '</s>' has the id 96" in told(folder).findings[0].message


def test_one_id_for_two_words(folder: Path) -> None:
    (finding,) = told(tokenizer(folder, words(90) | {"again": 7}, {"</s>": 91})).findings
    assert "'word7' and 'again' the same id 7" in finding.message


def test_a_special_token_that_is_nowhere(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", {"pad_token": {"content": "[PAD]"}})
    assert told(folder).findings == []
    assert "pad_token '[PAD]' is not in tokenizer.json" in told(folder).notes[0]


@pytest.mark.parametrize("value", ["one", -1, 1.5, None, True])
def test_ids_that_are_none(folder: Path, value: object) -> None:
    (finding,) = told(tokenizer(folder, words(3) | {"odd": value}, {"</s>": 2})).findings
    assert f"gives 'odd' the id {value!r}" in finding.message


def test_a_tokenizer_without_a_vocabulary(folder: Path) -> None:
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    assert "has no model.vocab" in told(folder).findings[0].message


@pytest.mark.parametrize(
    ("config", "generation", "findings", "notes"),
    [
        ({"eos_token_id": 96}, {"eos_token_id": [96, 97]}, 1, 1),  # generation_config goes first
        ({"eos_token_id": 96}, {"eos_token_id": 2}, 0, 1),
        ({"eos_token_id": 96}, {"eos_token_id": None}, 1, 0),
        ({"eos_token_id": [2, 96]}, {"eos_token_id": None}, 0, 1),
        ({"pad_token_id": -1, "bos_token_id": None}, {}, 0, 0),
        ({"pad_token_id": 96}, {}, 0, 1),
    ],
)
def test_ids_of_the_configs(
    folder: Path, config: dict[str, Any], generation: dict[str, Any], findings: int, notes: int
) -> None:
    edit_json(folder / "config.json", config)
    edit_json(folder / "generation_config.json", generation)
    found = told(folder)
    assert (len(found.findings), len(found.notes)) == (findings, notes), found
    if findings:
        assert "generation would never end" in found.findings[0].message


def test_vocab_json_with_added_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("")
    write_json(folder / "vocab.json", words(90))
    write_json(folder / "added_tokens.json", {"</s>": 91})
    assert told(folder) == Told()
    write_json(folder / "vocab.json", words(100))
    assert "vocab.json has the token 'word96'" in told(folder).findings[0].message


def test_added_tokens_of_an_older_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", {"pad_token": "[PAD]"})
    listed = {"92": {"content": "[PAD]"}, "x": {"content": "no id"}, "93": "no token"}
    edit_json(folder / "tokenizer_config.json", {"added_tokens_decoder": listed})
    assert told(folder) == Told()
    edit_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"96": listed["92"]}})
    assert "'[PAD]' with the id 96 beyond the 96 rows" in told(folder).notes[0]
    assert told(folder).findings == []  # nothing is padded with it here


def test_a_sentencepiece_model_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    model = ROOT / "examples/tiny_llama/instruct/tokenizer.model"
    assert count_pieces(model.read_bytes()) == 2048
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    assert "the token 'piece 96' with the id 96 and 1951 more" in told(folder).findings[0].message
    for broken in (model.read_bytes()[:-1], b"", b"\x0a\x07sentencepiece", b"\xff" * 20):
        (folder / "tokenizer.model").write_bytes(broken)
        assert "no SentencePiece model" in told(folder).findings[0].message


def test_a_large_tokenizer_takes_seconds(folder: Path) -> None:
    tokenizer(folder, {f"a rather long word {n}": n for n in range(500_000)}, {"</s>": 2})
    started = time.monotonic()
    assert len(told(folder).findings) == 1
    assert time.monotonic() - started < 20


def test_a_huge_sentencepiece_model_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(bytes(1001))
    monkeypatch.setattr(tokenizer_checks, "PIECES_LIMIT_BYTES", 1000)
    assert "its token ids are not checked" in told(folder).notes[0]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"model": {"vocab": [1, {"a": 1}, None, ["word", 0.0], "x"]}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"\u00b2": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
    ],
)
def test_what_is_no_list_of_tokens_ends_nothing(folder: Path, file: str, change: Any) -> None:
    edit_json(folder / file, change)
    assert told(folder).findings == []


def test_a_token_of_a_megabyte_is_shown_in_part(folder: Path) -> None:
    (finding,) = told(tokenizer(folder, {"x" * 10**6: VOCABULARY}, {"</s>": 2})).findings
    assert len(finding.message) < 400


def test_an_embedding_of_another_name(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    del checkpoint.tensors["model.embed_tokens.weight"]
    assert "not checked" in check_tokenizer(checkpoint).notes[0]
    assert json.loads((folder / "config.json").read_text())  # nothing was touched
