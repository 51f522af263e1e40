"""Small artifacts with the files of the measure stage, built from logits so that all agrees."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantize.plan import StageEntry
from quantize.protocol import write_json
from quantize.recipe import Recipe
from quantize.records import MEASURE_SCHEMA
from quantize.report.paired.comparing import compare
from quantize.stages.base import Resolved, StageContext
from quantize.stages.compare import rules
from quantize.store import Artifact, Store

VOCABULARY = 32
DOCUMENTS = 24
TOKENS_PER_DOCUMENT = 10


HELD_OUT = (
    "The bridge below the mill was built of oak in the year of the long frost and has been mended "
    "twice since, once by the miller and once by nobody who would give a name."
)


@dataclass
class Side:
    """What one served model does; two sides of one comparison differ in these alone."""

    logits: np.ndarray  # (tokens, vocabulary)
    scores: Mapping[str, Sequence[float]]  # by task, one a document
    answers: Mapping[str, str]
    failing: frozenset[str] = frozenset()  # smoke prompts whose check fails
    min_similarity: Mapping[str, float] = field(default_factory=dict)  # by smoke prompt
    weight_bytes: int = 1_234_567
    tokens_per_second: float = 123.4
    top_k: int = 8
    served: bool = True
    quick: bool = False
    asked: str = ""  # stands before every task prompt: a side with another one was asked otherwise
    cluster_of: int = 0  # documents that share a cluster; 0: all are independent
    health: Sequence[Mapping[str, Any]] = ()  # lines of health.jsonl
    own_text: bool = False  # the same tokens as the suite's text
    not_measured: list[dict[str, str]] = field(default_factory=list)


def baseline_side(seed: int = 0) -> Side:
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(DOCUMENTS * TOKENS_PER_DOCUMENT, VOCABULARY))
    return Side(
        logits=logits,
        scores={"valley_mc": [1, 1, 1, 0] * 10, "valley_qa": [1, 0, 1, 1, 0] * 6},
        answers={"capital": "Ivelstone is the capital.", "count": "One, two, three."},
    )


def candidate_side(seed: int = 0, noise: float = 0.2) -> Side:
    side = baseline_side(seed)
    generator = np.random.default_rng(seed + 1)
    side.logits = side.logits + noise * generator.normal(size=side.logits.shape)
    side.scores = {"valley_mc": [1, 0, 1, 0] + [1, 1, 1, 0] * 9, "valley_qa": [1, 0, 1, 1, 1] * 6}
    side.answers = {"capital": "Ivelstone is the capital.", "count": "One, two, four."}
    side.weight_bytes = 432_109
    side.tokens_per_second = 171.2
    return side


def questions() -> tuple[np.ndarray, np.ndarray]:
    """Scored token ids and their documents, the same for both sides."""
    tokens = DOCUMENTS * TOKENS_PER_DOCUMENT
    token = np.random.default_rng(9).integers(0, VOCABULARY, tokens)
    return token, np.arange(tokens) // TOKENS_PER_DOCUMENT


def token_arrays(logits: np.ndarray, token: np.ndarray, document: np.ndarray, k: int) -> dict:
    """The arrays of `token_logprobs.npz`, as a server reports these logits."""
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    starts = np.searchsorted(document, document)  # documents come in order
    return {
        "document": document.astype(np.int32),
        "token": token.astype(np.int32),
        "position": (np.arange(len(token)) - starts + 1).astype(np.int32),
        "logprob": logprobs[np.arange(len(token)), token].astype(np.float32),
        "top_ids": top.astype(np.int32),
        "top_logprobs": np.take_along_axis(logprobs, top, axis=1).astype(np.float32),
    }


def sample(
    task: str, doc: int, score: float, asked: str = "", cluster_of: int = 0
) -> dict[str, Any]:
    prompt = f"{asked}{task} {doc}"
    return {
        "doc": str(doc),
        "group": f"g{doc % 4}",
        "cluster": f"c{doc // cluster_of}" if cluster_of else "",
        "prompt": prompt,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "target": "a",
        "response": "a" if score else "b",
        "score": score,
        "scores": [score],
    }


def task_record(name: str, scores: Sequence[float]) -> dict[str, Any]:
    values = np.nan_to_num(np.asarray(scores if len(scores) else [0], dtype=float))
    return {
        "name": name,
        "version": "1.0",
        "metric": "acc" if name.endswith("mc") else "exact_match",
        "higher_is_better": True,
        "score": float(values.mean()),
        "standard_error": float(values.std() / np.sqrt(max(1, len(values) - 1))),
        "documents": len(scores),
        "num_fewshot": 0,
        "chat_template": True,
        "prompts_sha256": "b" * 64,
        "repeats": 1,
    }


def smoke_record(name: str, answer: str, passed: bool) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "chat",
        "prompt": f"Tell me about {name}.",
        "answer": answer,
        "finish_reason": "stop",
        "completion_tokens": 6,
        "seconds": 0.2,
        "checks": [{"name": "not empty", "passed": passed, "detail": ""}],
    }


def artifact(store: Store, kind: str, key: str, files: Mapping[str, Any], **manifest: Any):
    """A committed artifact; a value that is not bytes is written as JSON."""
    with store.staging(kind, key) as staging:
        for name, value in files.items():
            path = staging.files / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(value, bytes):
                path.write_bytes(value)
            else:
                write_json(path, value)
        made = {"stage": kind, "code": 1, "inputs": {}, "locks": {}, "with": {}}
        inputs = {**made, **manifest.pop("key_inputs", {})}
        given = {"key_inputs": inputs, "recipe": "tiny", "seconds": {"total": 1.0}, "versions": {}}
        return store.commit(staging, **{**given, **manifest})


def measure_artifact(store: Store, key: str, side: Side) -> Artifact:
    """A measure artifact of `side`; one that is not served has its subject alone."""
    record: dict[str, Any] = {
        "schema": MEASURE_SCHEMA,
        "subject": {"key": key, "bytes": side.weight_bytes, "parameters": 6_000_000},
        "suite": "tiny",
        "smoke": [],
        "tasks": [],
        "quick": side.quick,
        "not_measured": side.not_measured,
        "versions": {"vllm": "0.32.0", "lm-eval": "0.4.13"},
        "seconds": {"server start": 21.5},
    }
    files: dict[str, Any] = {"record.json": record}
    if side.served:
        files |= _served(record, side)
    asked = {
        "locks": {"vllm": "1" * 64, "lmeval": "2" * 64},
        "with": {"suite": "3" * 64, "prompts": "4" * 64, "text": f"acme/valley@{'5' * 40}"},
    }
    versions = record["versions"]
    return artifact(store, "measure", key, files, versions=versions, key_inputs=asked)


def _served(record: dict[str, Any], side: Side) -> dict[str, Any]:
    token, document = questions()
    arrays = token_arrays(side.logits, token, document, side.top_k)
    nats = -float(arrays["logprob"].astype(np.float64).sum())
    record["server"] = {
        "name": "vllm",
        "version": "0.32.0",
        "command": ["vllm", "serve", "MODEL", "--max-model-len", "1024"],
        "accelerator": "cpu",
        "device": "a processor",
        "start_seconds": 21.5,
    }
    record["perplexity"] = {
        "text": "valley.jsonl",
        "text_sha256": "a" * 64,
        "tokens_sha256": hashlib.sha256(arrays["token"].tobytes()).hexdigest(),
        "documents": DOCUMENTS,
        "windows": DOCUMENTS,
        "window": TOKENS_PER_DOCUMENT + 1,
        "stride": TOKENS_PER_DOCUMENT,
        "joined": False,
        "bos": True,
        "excluded": "BOS",
        "top_k": side.top_k,
        "scored_tokens": len(token),
        "total_nats": nats,
        "perplexity": float(np.exp(nats / len(token))),
    }
    record["tasks"] = [task_record(name, scores) for name, scores in side.scores.items()]
    record["smoke"] = [
        smoke_record(name, answer, name not in side.failing)
        | (
            {"min_baseline_similarity": side.min_similarity[name]}
            if name in side.min_similarity
            else {}
        )
        for name, answer in side.answers.items()
    ]
    record["serving"] = {
        "requests": 16,
        "concurrency": 4,
        "input_tokens": 128,
        "output_tokens": 64,
        "time_to_first_token_ms_median": 41.5,
        "time_to_first_token_ms_p99": 88.25,
        "time_per_output_token_ms_median": 9.5,
        "output_tokens_per_second": side.tokens_per_second,
        "requests_per_second": 1.93,
        "kv_cache_tokens": 58_240,
        "prometheus": {"vllm:num_preemptions_total": 0.0},
    }
    files: dict[str, Any] = {
        "token_logprobs.npz": _npz(arrays),
        "token_logprobs.jsonl": _json_lines([{"document": 0, "text": HELD_OUT}]),
    }
    if side.own_text:
        record["own_perplexity"] = {**record["perplexity"], "text": "own.jsonl"}
        for suffix in ("npz", "jsonl"):
            files[f"own_token_logprobs.{suffix}"] = files[f"token_logprobs.{suffix}"]
    if side.health:
        record["health"] = {"prompts": len(side.health), "prompts_sha256": "c" * 64}
        files["health.jsonl"] = _json_lines(side.health)
    for name, scores in side.scores.items():
        files[f"samples/{name}.jsonl"] = _json_lines(
            [
                sample(name, doc, score, side.asked, side.cluster_of)
                for doc, score in enumerate(scores)
            ]
        )
    return files


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def new_store(folder: Path) -> Store:
    return Store(folder / "store")


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny-llama-awq",
    "model": {"source": "examples/tiny_llama/instruct", "license": "apache-2.0"},
    "calibration": {"source": "examples/tiny_llama/calibration.jsonl", "samples": 128},
    "quantize": {"method": "awq", "scheme": "W4A16_ASYM"},
    "evaluate": {
        "suite": "tiny",
        "margins": {"perplexity_ratio": 1.05, "task_drop": 0.03},
        "gate": {"inconclusive": "pass"},  # the sides are small
    },
    "serve": {"max_model_len": 1024, "max_num_seqs": 16},
    "publish": {"folder": "out/tiny-llama-awq"},
}


def stage_context(
    folder: Path,
    store: Store,
    stage_id: str,
    inputs: Mapping[str, Artifact],
    recipe: Mapping[str, Any] = RECIPE,
) -> StageContext:
    """A context for a stage that starts no process: it has no runner."""
    resolved = resolved_recipe(folder, recipe)
    files, work = folder / "files", folder / "work"
    files.mkdir()
    work.mkdir()
    entry = StageEntry(id=stage_id, kind=stage_id, key="k" * 64, key_inputs={})
    return StageContext(
        entry=entry,
        resolved=resolved,
        inputs=inputs,
        files=files,
        work=work,
        runner=None,  # type: ignore[arg-type]
        store=store,
    )


def resolved_recipe(folder: Path, recipe: Mapping[str, Any] = RECIPE) -> Resolved:
    return Resolved(
        recipe=Recipe.model_validate_json(json.dumps(recipe)),
        folder=folder,
        accelerator="cpu",
        digests={},
    )


def card_inputs(
    store: Store,
    before: Side,
    after: Side,
    *,
    source: Mapping[str, Any] = {},
    compressed: Mapping[str, Any] = {},
    key: str = "",
) -> dict[str, Artifact]:
    """Every artifact that the card stage reads, by role.

    `source` changes source.json, `compressed` compress.json.
    """
    weights = [{"name": "model.safetensors", "bytes": before.weight_bytes, "sha256": "d" * 64}]
    facts = {
        "kind": "folder",
        "folder": "/home/someone/checkpoints/instruct",
        "files": weights,
        "parameters": 6_000_000,
        "weight_bytes": before.weight_bytes - 1000,
        "architecture": "LlamaForCausalLM",
        "tied_embeddings": False,
        "license": "apache-2.0",
        "languages": ["en"],
        "base_model": None,
        "licence_terms": {},
        "attention": {"layers": 4, "kv_heads": 2, "head_size": 32},
        "positions": 1024,
        "chat_template": True,
    }
    compress = {
        "method": "awq",
        "scheme": "W4A16_ASYM",
        "group_size": 128,
        "quantized": ["model.layers.0.mlp.down_proj"],
        "engine": "stream",
        "unvisited": [],
        "not_factorised": [],
        "seconds": 31.2,
        **compressed,
    }
    audit = {
        "checks": [{"name": "every tensor", "passed": True, "detail": ""}],
        "quantized_modules": 28,
        "kept_modules": ["lm_head"],
        "bytes": {"source": 1, "artifact": 1, "expected": 1},
        "size_ratio": 0.35,
        "tensor_parallel": {
            "1": [],
            "2": [],
            "4": ["model.layers.0.mlp.down_proj with 768 inputs (shares of 128 inputs each)"],
        },
    }
    calibrate = {
        "source": "calibration.jsonl",
        "rows": 200,
        "rows_used": 128,
        "sequences": 128,
        "tokens": 15_321,
        "sequence_length": 256,
        "chat_template_applied": True,
        "seed": 0,
    }
    sides = {
        "baseline": measure_artifact(store, f"b{key}", before),
        "candidate": measure_artifact(store, f"c{key}", after),
    }
    comparison, details = compare(*sides.values(), rules(resolved_recipe(Path())))
    model = {"model/model.safetensors": bytes(after.weight_bytes), "model/config.json": {}}
    return sides | {
        "fetch": artifact(
            store,
            "fetch",
            f"f{key}",
            {"source.json": {**facts, **source}},
            key_inputs={"with": {"model": "6" * 64}},
        ),
        "calibrate": artifact(
            store,
            "calibrate",
            f"l{key}",
            {"calibrate.json": calibrate, "tokens.npz": b"tokens"},
            key_inputs={"with": {"data": "e" * 64}},
        ),
        "compress": artifact(
            store,
            "compress",
            f"q{key}",
            {"compress.json": compress, **model},
            versions={"llmcompressor": "0.14.0.1", "torch": "2.13.0"},
            key_inputs={"locks": {"llmcompressor": "7" * 64}},
        ),
        "audit": artifact(store, "audit", f"a{key}", {"audit.json": audit}),
        "compare": artifact(
            store, "compare", f"d{key}", {"record.json": comparison, "details.json": details}
        ),
    }
