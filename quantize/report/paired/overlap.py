"""Runs of words that calibration rows share with evaluation documents.

Words are compared without case, punctuation and white space, as in GPT-3's contamination analysis
(Brown et al. 2020, arXiv:2005.14165, appendix C), with its N-grams of 13 words; scripts without
spaces count each character as a word. A paragraph of 8 to 12 words is looked for as a whole: its
parts would be found by chance; a shorter one is not looked for.

One shared N-gram is not yet overlap: stock phrases are as long. What a row shares with one
paragraph of a document must be half of the words of the shorter of the two (between the 20% of
Llama 2, arXiv:2307.09288, appendix A.6, and the 70% of PaLM, arXiv:2204.02311, section 8), or 50
words (Lee et al. 2022, arXiv:2107.06499). Paragraphs end at blank lines and at markers of a chat
template; few-shot prompts put one between examples.

Boilerplate is not overlap either:

- markers of chat templates (`<|user|>`, `[INST]`, a role's name after one) end a run of words, and
  N-grams do not cross them;
- so do 4-grams that are in more than half of the rows or of one task's documents: a default system
  prompt, the same few-shot examples;
- N-grams in more than 1% of one task's documents or 10% of the rows, and in more than 10, are left
  out: few-shot examples of one subject, a form that a data set repeats.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NGRAM = 13
WHOLE = 8
SHARED_PART = 0.5
SHARED_WORDS = 50
BOILERPLATE_WORDS = 4
BOILERPLATE_SHARE, BOILERPLATE_TEXTS, BOILERPLATE_SAMPLE = 0.5, 4, 1000
COMMON_ROWS, COMMON_DOCUMENTS, COMMON_TEXTS = 0.10, 0.01, 10

MARKER = re.compile(
    r"(?:<\|[^<>|]{1,40}\|>|<(?:start|end)_of_turn>|<</?sys>>|\[/?(?:inst|system_prompt)\]"
    r"|<(?:/?s|bos|eos|pad)>)(?:(?:system|user|assistant|model|tool|ipython)(?=\s*\n|<))?"
)
"""A special token of a chat template in normalised text, with the role that it introduces."""
PARAGRAPH = re.compile(rf"{MARKER.pattern}|\n\s*\n")

_ONE_EACH = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # not \w, yet inside words
_LETTER = rf"(?:[^\W_{_ONE_EACH}]|[{_MARKS}])"
WORD = re.compile(rf"[{_ONE_EACH}]|{_LETTER}+(?:['’]{_LETTER}+)*")

FILTER_SHIFT = np.uint64(40)

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """What a row and a document have in common; both are counted from 0."""

    row: int
    document: int
    shared: int  # words of the document that are covered
    phrase: str  # the first shared N-gram


def paragraphs(text: str) -> Iterator[list[str]]:
    """Words without case and punctuation, cut at blank lines and markers of a chat template."""
    for part in PARAGRAPH.split(_normalised(text)):
        if words := WORD.findall(part):
            yield words


def has_marker(text: str) -> bool:
    """Whether `text` has special tokens of a chat template."""
    return MARKER.search(_normalised(text)) is not None


def without_markers(text: str) -> str:
    """`text` without special tokens of chat templates, for what looks at its language."""
    return MARKER.sub(" ", _normalised(text))


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


class _Words:
    """Words of many texts in one row; N-grams stay inside a run. Arrays are (words,) each."""

    def __init__(self, ids: Integers, text: Integers, part: Integers, run: Integers) -> None:
        self.ids = ids  # in the vocabulary; -1: not there
        self.text = text  # which of the texts
        self.part = part  # which paragraph of all
        self.run = run  # changes where something was cut out

    @classmethod
    def of(cls, texts: Sequence[str], vocabulary: dict[str, int], *, grow: bool) -> _Words:
        """Read `texts`; words outside a vocabulary that does not grow are -1."""
        ids: list[int] = []
        lengths, owners = [], []
        for index, text in enumerate(texts):
            for words in paragraphs(text):
                if grow:
                    ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
                else:
                    ids += [vocabulary.get(word, -1) for word in words]
                lengths.append(len(words))
                owners.append(index)
        counts = np.asarray(lengths, np.int64)
        part = np.repeat(np.arange(len(counts)), counts)
        text_of = np.repeat(np.asarray(owners, np.int64), counts)
        return cls(np.asarray(ids, np.int64), text_of, part, part)

    def kept(self, keep: NDArray[np.bool_]) -> _Words:
        """Only the words to keep; N-grams do not cross what is left out."""
        run = self.run + np.cumsum(~keep)
        return _Words(self.ids[keep], self.text[keep], self.part[keep], run[keep])

    def ngrams(self, length: int) -> tuple[Hashes, Integers]:
        """(hash, position of the first word) of every N-gram of `length` words."""
        count = len(self.ids) - length + 1
        if count <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        values = _mixed(self.ids)
        factors = _mixed(np.arange(1, length + 1)) | np.uint64(1)
        hashes = np.zeros(count, np.uint64)
        for offset in range(length):
            hashes += values[offset : offset + count] * factors[offset]
        inside = self.run[:count] == self.run[length - 1 :]
        return hashes[inside], np.flatnonzero(inside)

    def without_boilerplate(self, texts: int) -> _Words:
        """Without the words of 4-grams that more than half of the texts contain."""
        hashes, first = self.ngrams(BOILERPLATE_WORDS)
        step = -(-texts // BOILERPLATE_SAMPLE) or 1  # every so-many-th text shows what is common
        sample = self.text[first] % step == 0
        limit = max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * texts / step)
        common = hashes[sample][_in_many(hashes[sample], self.text[first[sample]], limit)]
        begins = first[np.isin(hashes, np.unique(common))]
        covered = np.zeros(len(self.ids), bool)
        for offset in range(BOILERPLATE_WORDS):
            covered[begins + offset] = True
        return self.kept(~covered)


class RowIndex:
    """The N-grams of calibration rows, made once and asked for one task after another."""

    def __init__(self, rows: Sequence[str]) -> None:
        self._vocabulary: dict[str, int] = {}
        words = _Words.of(rows, self._vocabulary, grow=True)
        self._words = words.without_boilerplate(len(rows))
        self._lengths = np.bincount(self._words.text, minlength=len(rows))  # (rows,) words
        self._common = max(COMMON_TEXTS, COMMON_ROWS * len(rows))
        self._names = list(self._vocabulary)
        self._grams: dict[int, tuple[Hashes, Integers]] = {}

    def overlaps(self, documents: Sequence[str], ngram: int = NGRAM) -> list[Overlap]:
        """The largest overlap of every row that has one with `documents`, by row."""
        words = _Words.of(documents, self._vocabulary, grow=False)
        known = words.kept(words.ids >= 0)  # a word that no row has is in no shared N-gram
        rest = known.without_boilerplate(len(documents))
        everything, kept, left = (
            np.bincount(some.part, minlength=words.part.max(initial=0) + 1)
            for some in (words, known, rest)
        )
        lengths = everything - (kept - left)  # (paragraphs,) words without boilerplate
        common = max(COMMON_TEXTS, COMMON_DOCUMENTS * len(documents))
        found: dict[int, Overlap] = {}
        for size in range(min(WHOLE, ngram), ngram + 1):
            asked = lengths >= size if size == ngram else lengths == size
            for overlap in self._shared(rest.kept(asked[rest.part]), lengths, size, common):
                before = found.get(overlap.row)
                if before is None or overlap.shared > before.shared:
                    found[overlap.row] = overlap
        return [found[row] for row in sorted(found)]

    def _shared(
        self, documents: _Words, lengths: Integers, size: int, common: float
    ) -> Iterator[Overlap]:
        """Every row and paragraph whose shared N-grams cover enough of the shorter one."""
        row_hashes, row_first = self._sorted(size)
        hashes, first = documents.ngrams(size)
        possible = _seen(row_hashes)[hashes >> FILTER_SHIFT]  # most have no row: a fast first look
        hashes, first = _uncommon(hashes[possible], first[possible], documents.text, common)
        left = np.searchsorted(row_hashes, hashes, "left")
        times = np.searchsorted(row_hashes, hashes, "right") - left  # places in rows
        gram = np.repeat(left - (np.cumsum(times) - times), times) + np.arange(times.sum())
        place = np.repeat(first, times)  # (pairs,) in the documents
        row, part = self._words.text[row_first[gram]], documents.part[place]
        order = np.lexsort((place, part, row))
        gram, row, part, place = gram[order], row[order], part[order], place[order]
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (part[1:] != part[:-1])
        covers = np.minimum(np.diff(place, prepend=0), size)  # words that the one before does not
        covers[new] = size
        pairs = np.flatnonzero(new)
        covered = np.add.reduceat(covers, pairs) if len(pairs) else covers
        shorter = np.minimum(self._lengths[row[pairs]], lengths[part[pairs]])
        for pair in np.flatnonzero(covered >= np.minimum(SHARED_WORDS, SHARED_PART * shorter)):
            at = pairs[pair]
            begin = row_first[gram[at]]
            phrase = " ".join(self._names[word] for word in self._words.ids[begin : begin + size])
            document = int(documents.text[place[at]])
            yield Overlap(int(row[at]), document, int(covered[pair]), phrase)

    def _sorted(self, size: int) -> tuple[Hashes, Integers]:
        """(hash, position) of the rows' N-grams of `size` words by hash, kept for the next task."""
        if size not in self._grams:
            hashes, first = self._words.ngrams(size)
            hashes, first = _uncommon(hashes, first, self._words.text, self._common)
            order = np.argsort(hashes, kind="stable")
            self._grams[size] = hashes[order], first[order]
        return self._grams[size]


def _uncommon(
    hashes: Hashes, first: Integers, text: Integers, limit: float
) -> tuple[Hashes, Integers]:
    """N-grams without those that more than `limit` of the texts contain."""
    common = _in_many(hashes, text[first], limit)
    return hashes[~common], first[~common]


def _seen(hashes: Hashes) -> NDArray[np.bool_]:
    """(2^24,) whether a hash begins with these 24 bits."""
    seen = np.zeros(1 << 24, bool)
    seen[hashes >> FILTER_SHIFT] = True
    return seen


def _in_many(hashes: Hashes, text: Integers, limit: float) -> NDArray[np.bool_]:
    """(n-grams,) whether each is in more than `limit` different texts."""
    order = np.lexsort((text, hashes))
    sorted_hashes, sorted_text = hashes[order], text[order]
    new = np.ones(len(order), bool)
    new[1:] = (sorted_hashes[1:] != sorted_hashes[:-1]) | (sorted_text[1:] != sorted_text[:-1])
    _, group = np.unique(sorted_hashes, return_inverse=True)
    many = np.bincount(group, weights=new)[group] > limit if len(group) else new
    answer = np.empty(len(order), bool)
    answer[order] = many
    return answer


def _mixed(values: Integers) -> Hashes:
    """splitmix64: 64 well-mixed bits of each integer; two of 10⁷ n-grams collide once in 10⁵."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
