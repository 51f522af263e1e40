"""The audit of the BF16 file against the checkpoint that it was made from.

The converter renames tensors, reorders rows (rotary embeddings of Llama), joins experts and cuts
fused matrices. None of that changes a row, so what is held against the source is the *set of rows*,
by their length: each row's values as one 64-bit fingerprint. What a converter computes (Gemma's
norms plus one, state-space parameters) is another value; how many tensors that concerns is in the
check's detail, and for the architectures of `EXACT` it is a fault.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.artifact_checks import Check
from quantize.checkpoint import EMBEDDING, Checkpoint, chat_template
from quantize.gguf.file import Gguf, GgufTensor
from quantize.gguf.values import CHUNK_BYTES, Report, dequantized
from quantize.model_files import read_json_object, special_tokens
from quantize.tensors import TensorInfo, from_float32, load_tensor, to_float32

EXACT = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Phi3ForCausalLM",
    }
)
"""Architectures whose converter moves rows and changes no value."""

PLUS_ONE = ("Gemma",)
"""Architectures by their beginning whose norms are stored plus one."""

DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of GGUF that come out of config.json."""

TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "llama": ("SentencePiece",),
    "gpt2": ("byte-level BPE",),
    "t5": ("Unigram",),
    "bert": ("WordPiece",),
}
"""`tokenizer.ggml.model` → what it is in words; newer kinds are not judged."""

TOKEN_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
"""transformers' name of a special token → GGUF's, in `tokenizer.ggml.<name>_token_id`."""

SHOWN = 3

Bits = npt.NDArray[np.uint32]
Prints = npt.NDArray[np.uint64]


def check_converted(source: Checkpoint, converted: Gguf, report: Report) -> list[Check]:
    """The BF16 file against the source: weights, tokenizer, chat template."""
    return [
        _check_rows(source, converted, report),
        *_check_tokenizer(source, converted),
    ]


@dataclass(frozen=True)
class Rows:
    """The rows of one tensor: their length, and the fingerprints in an order that says nothing."""

    name: str
    columns: int
    prints: Prints


def fingerprints(bits: Bits) -> Prints:
    """One number for each row of float32 bits (rows, columns), by values and places, (rows,).

    A sum of products with fixed odd numbers modulo 2^64, mixed (the finaliser of splitmix64). Rows
    that differ have the same with a chance of about 2^-64: enough against errors, not against a
    forger, who has the hashes of the store against them.
    """
    columns = bits.shape[1]
    weights = np.random.default_rng(columns).integers(0, 2**63, columns, dtype=np.uint64) * 2 + 1
    with np.errstate(over="ignore"):
        sums = ((bits.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) * weights).sum(axis=1)
        sums = (sums ^ (sums >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        sums = (sums ^ (sums >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Prints = sums ^ (sums >> np.uint64(31))
    return mixed


def _check_rows(source: Checkpoint, converted: Gguf, report: Report) -> Check:
    """Each row of the source, rounded to the file's format, is there as often, and no other."""
    there = _by_length(
        _tensor_rows(tensor, report)
        for name, tensor in converted.tensors.items()
        if name not in DERIVED
    )
    found, changed = [], []
    for variants in _source_rows(source, report):
        form = next((rows for rows in variants if _all_in(rows, there)), None)
        if form is None:
            changed.append(variants[0].name)
        else:
            found.append(form)
    wrong = _differing(there, _by_length(iter(found)))
    total = len(found) + len(changed)
    detail = f"{len(found)} of {total} tensors of the source are in the file, row by row"
    if changed:
        detail += f"; changed by the converter: {', '.join(changed[:SHOWN])}"
        detail += f" and {len(changed) - SHOWN} more" if changed[SHOWN:] else ""
    if wrong:
        detail += f"; {wrong} rows of the file are more or fewer than in the source"
    exact = source.architecture in EXACT
    return Check("BF16 weights are the source's", not (exact and (changed or wrong)), detail)


def _by_length(rows: Iterator[Rows]) -> dict[int, Prints]:
    """All fingerprints of rows of one length, sorted: a set in which rows may be repeated."""
    found: dict[int, list[Prints]] = defaultdict(list)
    for one in rows:
        found[one.columns].append(one.prints)
    return {columns: np.sort(np.concatenate(prints)) for columns, prints in found.items()}


def _all_in(rows: Rows, there: Mapping[int, Prints]) -> bool:
    """Whether each row is in the file at least once."""
    prints = there.get(rows.columns)
    if prints is None:
        return False
    places = np.minimum(np.searchsorted(prints, rows.prints), len(prints) - 1)
    return bool(np.all(prints[places] == rows.prints))


def _differing(ours: Mapping[int, Prints], theirs: Mapping[int, Prints]) -> int:
    """How many rows one side has more often than the other."""
    wrong = 0
    for columns in {*ours, *theirs}:
        sides = [side.get(columns, np.empty(0, np.uint64)) for side in (ours, theirs)]
        values, places = np.unique(np.concatenate(sides), return_inverse=True)
        counts = [
            np.bincount(part, minlength=len(values)) for part in np.split(places, [len(sides[0])])
        ]
        wrong += int(np.abs(counts[0] - counts[1]).sum())
    return wrong


def _source_rows(source: Checkpoint, report: Report) -> Iterator[list[Rows]]:
    """Of each tensor its possible forms: BF16, FP32 (norms, routers), Gemma's norms plus one."""
    tied = source.tied_embeddings
    plus_one = source.architecture.startswith(PLUS_ONE)
    for name, info in source.tensors.items():
        if (name == "lm_head.weight" and tied) or name.endswith(".rotary_emb.inv_freq"):
            continue
        forms = ["BF16"] if info.dtype == "BF16" else ["BF16", "F32"]
        variants = [_rows_of(info, form) for form in forms]
        if plus_one and len(info.shape) == 1:
            variants.append(_rows_of(info, "F32", add=1.0))
        report(info.bytes)
        yield variants


def _rows_of(info: TensorInfo, form: str, add: float = 0.0) -> Rows:
    """A tensor's rows in one form; a vector is one row."""
    columns = info.shape[-1] if info.shape else 1
    flat = load_tensor(info).reshape(-1, columns)
    step = max(1, CHUNK_BYTES // (4 * columns))
    found = []
    for start in range(0, len(flat), step):
        values = to_float32(np.asarray(flat[start : start + step]), info.dtype)
        if add:
            values = values + np.float32(add)
        bits = from_float32(values, form)
        found.append(fingerprints(_widened(bits) if form == "BF16" else bits.view(np.uint32)))
    return Rows(info.name, columns, np.concatenate(found))


def _tensor_rows(tensor: GgufTensor, report: Report) -> Rows:
    rows, columns = tensor.load(), tensor.shape[-1] if tensor.shape else 1
    step = max(1, CHUNK_BYTES // (4 * columns))
    found = [
        fingerprints(_bits(np.asarray(rows[start : start + step]), tensor))
        for start in range(0, len(rows), step)
    ]
    report(tensor.bytes)
    return Rows(tensor.name, columns, np.concatenate(found))


def _bits(rows: npt.NDArray[np.uint8], tensor: GgufTensor) -> Bits:
    """Float32 bits of BF16, FP16 or FP32 rows; BF16 is the upper half of a float32."""
    if tensor.type.name == "BF16":
        return _widened(rows.view("<u2"))
    return np.ascontiguousarray(dequantized(rows, tensor.type)).view(np.uint32)


def _widened(bits: npt.NDArray[Any]) -> Bits:
    """BF16 bits as those of the same float32."""
    return (bits.astype(np.uint32) << 16).astype(np.uint32)


def _check_tokenizer(source: Checkpoint, made: Gguf) -> list[Check]:
    """Kind, size and texts of the vocabulary, special tokens and chat template."""
    tokens = made.metadata.get("tokenizer.ggml.tokens", [])
    return [
        _check_vocabulary(source, made, tokens),
        _check_special_tokens(source, made, tokens),
        _check_template(source, made),
    ]


def _check_vocabulary(source: Checkpoint, made: Gguf, tokens: list[str]) -> Check:
    kind = str(made.metadata.get("tokenizer.ggml.model"))
    faults = []
    rows = [info.shape[0] for name, info in source.tensors.items() if EMBEDDING.search(name)]
    if not tokens or (rows and len(tokens) not in rows):
        faults.append(f"{len(tokens)} tokens, the source's embedding has {rows}")
    expected = _kind_of_tokenizer(source)
    if expected is not None and expected != kind and kind in TOKENIZERS:
        faults.append(f"its kind is {kind}, the source's is {expected}")
    differing = [
        index
        for token, index in _vocabulary(source).items()
        if index >= len(tokens) or tokens[index] != token
    ]
    if differing:
        faults.append(f"{len(differing)} tokens have other texts, the first is {min(differing)}")
    said = " ".join(TOKENIZERS.get(kind, (kind,)))
    return Check(
        "tokenizer", not faults, "; ".join(faults) or f"{said}, {len(tokens)} tokens as the source"
    )


def _tokenizer_json(source: Checkpoint) -> dict[str, Any]:
    path = source.folder / "tokenizer.json"
    return read_json_object(path) if path.is_file() else {}


def _kind_of_tokenizer(source: Checkpoint) -> str | None:
    """GGUF's name of the kind, as tokenizer.json tells it; None where it does not."""
    model = _tokenizer_json(source).get("model")
    if not isinstance(model, dict):
        return None
    match model.get("type"), bool(model.get("byte_fallback")):
        case "BPE", True:
            return "llama"
        case "BPE", False:
            return "gpt2"
        case "WordPiece", _:
            return "bert"
    return None  # Unigram is `llama` or `t5`, by what the model was trained with


def _vocabulary(source: Checkpoint) -> dict[str, int]:
    """Text → id of what tokenizer.json has as its model's vocabulary, without added tokens."""
    tokenizer = _tokenizer_json(source)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return {}
    added = {token["id"] for token in tokenizer.get("added_tokens", [])}
    return {text: index for text, index in vocabulary.items() if index not in added}


def _check_special_tokens(source: Checkpoint, made: Gguf, tokens: list[str]) -> Check:
    faults, compared = [], 0
    for theirs, text in special_tokens(source.folder).items():
        key = f"tokenizer.ggml.{TOKEN_KEYS.get(theirs, '')}_token_id"
        index = made.metadata.get(key)
        if index is None:
            continue
        compared += 1
        ours = tokens[index] if 0 <= index < len(tokens) else f"no token ({index})"
        if ours != text:
            faults.append(f"{theirs} is {ours!r}, the source's is {text!r}")
    detail = "; ".join(faults) or f"{compared} special tokens as the source has them"
    return Check("special tokens", not faults, detail)


def _check_template(source: Checkpoint, made: Gguf) -> Check:
    theirs, ours = chat_template(source.folder), made.metadata.get("tokenizer.chat_template")
    fine = "identical" if theirs is not None else "neither has one"
    same = theirs == ours
    return Check("chat template", same, fine if same else "differs from the source's")
