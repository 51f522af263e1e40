"""What a published checkpoint was made from, as an in-toto statement with SLSA's provenance.

`quantize/provenance.json` is an in-toto Statement v1 (https://in-toto.io/Statement/v1). Its
subjects are the published files; its predicate (https://slsa.dev/provenance/v1) says how they were
made:

- `externalParameters`: the recipe as published
- `internalParameters`: for each stage the key of its artifact, and the version of its code
- `resolvedDependencies`: source, adapter, calibration data and token ids, what the suite is made
  of, the environments' locks, the record. What a digest is of: :data:`DIGEST_OF`
- `builder`: this program, with its version and those of the tools

The statement is a function of the record, the recipe and the files' sha256 alone. It holds no time,
no path and no host, so that publishing the same again changes nothing, and anybody can compute it
again from what was published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantize.listing import LISTING, SIGNATURE
from quantize.report.redact import redact
from quantize.store import FileEntry

STATEMENT = "quantize/provenance.json"
RECORD = "quantize/record.json"
RECIPE = "quantize/recipe.yaml"

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:x-quantize:recipe-run:v1"
BUILDER_ID = "urn:x-quantize:run"

NO_SUBJECTS = frozenset({STATEMENT, LISTING, SIGNATURE})
"""A statement cannot hold its own sha256, nor that of what is written after it."""

DIGEST_OF = {
    "source": "canonical JSON of the sha256 of every file, by name",
    "adapter": "canonical JSON of the sha256 of every file, by name",
    "adapter_tokenizer": "canonical JSON of the sha256 of every file, by name",
    "suite": "canonical JSON of its values",
    "prompts": "canonical JSON of its values",
    "tasks": "canonical JSON of the sha256 of every file, by name",
    "environment": "canonical JSON of the lock's text, its exclusions and Python's version",
}
"""What the sha256 of a dependency is of, by role, where it is not a file."""

MEASURED_WITH = ("suite", "prompts", "text", "own_text", "tasks", "health")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def statement(
    record: Mapping[str, Any], recipe: Mapping[str, Any], files: Sequence[FileEntry]
) -> dict[str, Any]:
    """The statement on `files`, which include the record; a KeyError if `record` is incomplete.

    `record` is that of the card (:mod:`quantize.stages.card`), `recipe` the published one.
    """
    subjects = sorted((f for f in files if f.name not in NO_SUBJECTS), key=lambda f: f.name)
    own = next(f for f in subjects if f.name == RECORD)
    stages = {
        role: {"key": key, "code": record["key_inputs"][role]["code"]}
        for role, key in record["artifacts"].items()
    }
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"recipe": recipe},
            "internalParameters": {"stages": stages},
            "resolvedDependencies": [*dependencies(record), _file("record", RECORD, own.sha256)],
        },
        "runDetails": {"builder": {"id": BUILDER_ID, "version": _versions(record)}},
    }
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f.name, "digest": {"sha256": f.sha256}} for f in subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": redact(predicate),
    }


def dependencies(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """in-toto ResourceDescriptors of everything from outside that the result depends on."""
    inputs = record["key_inputs"]
    source, apart = record["source"], inputs.get("adapter", {"with": {}})
    fetched = {**inputs["fetch"]["with"], **apart["with"]}
    found = [_input("source", record["source_name"], fetched["model"])]
    if source["kind"] != "merged":  # else the files are those of the merge
        found += [_file("source file", file["name"], file["sha256"]) for file in source["files"]]
    names = {"adapter": record.get("adapter_name", "adapter"), "adapter_tokenizer": "tokenizer"}
    found += [
        _input(role, names.get(role, role), digest)
        for role, digest in sorted(fetched.items())
        if role != "model" and isinstance(digest, str)
    ]
    if "calibration" in record:
        data = record["calibration"]
        found.append(_input("calibration", data["source"], data["data_digest"]))
        found.append(_file("calibration tokens", "tokens.npz", data["tokens_sha256"]))
    found += _measured_with(record)
    locks = {lock for made in inputs.values() for lock in made["locks"].items()}
    return found + [_input("environment", name, digest) for name, digest in sorted(locks)]


def _measured_with(record: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The suite and what it asks; both sides are measured with the same."""
    if "candidate" not in record["key_inputs"]:
        return []
    digests = record["key_inputs"]["candidate"]["with"]
    suite = record["candidate"]["suite"]
    return [
        _input(role, suite if role == "suite" else f"{role} of {suite}", digests[role])
        for role in MEASURED_WITH
        if role in digests
    ]


def _input(role: str, name: str, digest: str) -> dict[str, Any]:
    """A dependency whose `digest` is a sha256, or repository@commit of the Hub."""
    if _SHA256.fullmatch(digest):
        found = _file(role, name, digest)
        if role in DIGEST_OF:
            found["annotations"]["digestOf"] = DIGEST_OF[role]
        return found
    repo, _, commit = digest.rpartition("@")
    kind = "" if role in ("source", "adapter") else "datasets/"
    return {
        "name": repo,
        "uri": f"hf://{kind}{repo}@{commit}",
        "digest": {"gitCommit": commit},
        "annotations": {"role": role},
    }


def _file(role: str, name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}, "annotations": {"role": role}}


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    """The version of this program, and each tool's as `stage/tool`: stages may differ in one."""
    tools = {
        f"{role}/{tool}": version
        for role, versions in sorted(record["versions"].items())
        for tool, version in sorted(versions.items())
    }
    return {"quantize": record["quantize"], **tools}
