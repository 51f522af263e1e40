"""The statement: in-toto's own types read it, and it says what the record says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementProto
from published_fixture import Publishing

from quantize.provenance import STATEMENT, dependencies, statement
from quantize.store import FileEntry

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = [
    FileEntry("quantize/record.json", 7, "b" * 64),
    FileEntry("model.safetensors", 5, "a" * 64),
    FileEntry("quantize/manifest.json", 3, "c" * 64),
    FileEntry("quantize/model.sig", 3, "d" * 64),
    FileEntry(STATEMENT, 3, "e" * 64),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Publishing:
    publishing = Publishing(tmp_path_factory.mktemp("publishing"))
    publishing.run({"folder": str(publishing.root / "out")})
    return publishing


@pytest.fixture
def record(published: Publishing) -> dict[str, Any]:
    path = published.root / "out" / "quantize" / "record.json"
    return dict(json.loads(path.read_text()))


def by_role(made: list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return [item for item in made if item["annotations"]["role"] == role]


def test_in_totos_own_types_read_every_field(published: Publishing) -> None:
    made = json.loads((published.root / "out" / STATEMENT).read_text())
    proto = ParseDict(made, StatementProto())  # an unknown field is an error
    Statement.copy_from_pb(proto).validate()
    predicate = ParseDict(made["predicate"], Provenance())
    build, run = predicate.build_definition, predicate.run_details
    assert build.external_parameters["recipe"]["quantize"]["scheme"] == "W4A16_ASYM"
    assert build.internal_parameters["stages"]["compress"]["key"] == "real"
    assert run.builder.version["compress/torch"] == "2.13.0"
    assert not run.HasField("metadata"), "a time would change it at every publish"
    digests = {item.name: dict(item.digest) for item in build.resolved_dependencies}
    assert digests["vllm"] == {"sha256": "1" * 64}
    assert digests["tokens.npz"].keys() == {"sha256"}


def test_subjects_are_the_files_but_those_that_come_after(record: dict[str, Any]) -> None:
    made = statement(record, record["recipe"], FILES)
    assert made["subject"] == [
        {"name": "model.safetensors", "digest": {"sha256": "a" * 64}},
        {"name": "quantize/record.json", "digest": {"sha256": "b" * 64}},
    ]
    last = made["predicate"]["buildDefinition"]["resolvedDependencies"][-1]
    assert (last["annotations"]["role"], last["digest"]["sha256"]) == ("record", "b" * 64)


def test_a_local_source_by_its_files_and_its_name_alone(record: dict[str, Any]) -> None:
    [source] = by_role(dependencies(record), "source")
    assert (source["name"], source["digest"]) == ("instruct", {"sha256": "6" * 64})
    [file] = by_role(dependencies(record), "source file")
    assert (file["name"], file["digest"]) == ("model.safetensors", {"sha256": "d" * 64})


def test_sources_on_the_hub_by_their_commits(record: dict[str, Any]) -> None:
    record["key_inputs"]["fetch"]["with"] = {
        "model": f"acme/base@{COMMIT}",
        "adapter": f"acme/lora@{COMMIT}",
    }
    record["source"]["kind"] = "merged"
    record["calibration"]["data_digest"] = f"acme/chats@{COMMIT}"
    made = dependencies(record)
    uris = [item["uri"] for item in made if "uri" in item]
    assert uris[:3] == [
        f"hf://acme/base@{COMMIT}",
        f"hf://acme/lora@{COMMIT}",
        f"hf://datasets/acme/chats@{COMMIT}",
    ]
    assert [i["digest"] for i in made if "uri" in i][:3] == [{"gitCommit": COMMIT}] * 3
    assert by_role(made, "source file") == [], "those are files of the merge"


def test_an_adapter_that_is_kept_apart_is_named_too(record: dict[str, Any]) -> None:
    assert not by_role(dependencies(record), "adapter")
    record["adapter_name"] = "lora"
    record["key_inputs"]["adapter"] = {
        "code": 1,
        "locks": {},
        "with": {"adapter": "e" * 64, "adapter_tokenizer": "f" * 64},
    }
    (adapter,) = by_role(dependencies(record), "adapter")
    assert (adapter["name"], adapter["digest"]) == ("lora", {"sha256": "e" * 64})
    (tokenizer,) = by_role(dependencies(record), "adapter_tokenizer")
    assert tokenizer["digest"] == {"sha256": "f" * 64}


def test_what_was_not_done_is_not_named(record: dict[str, Any]) -> None:
    for role in ("calibrate", "baseline", "candidate", "compare"):
        del record["key_inputs"][role]
    for role in ("calibration", "candidate"):
        del record[role]
    roles = {item["annotations"]["role"] for item in dependencies(record)}
    assert roles == {"source", "source file", "environment"}


def test_environments_are_those_of_all_stages_once(record: dict[str, Any]) -> None:
    names = [item["name"] for item in by_role(dependencies(record), "environment")]
    assert names == ["llmcompressor", "lmeval", "vllm"]


@pytest.mark.parametrize("missing", ["source", "key_inputs", "artifacts", "versions", "quantize"])
def test_an_incomplete_record_makes_no_statement(record: dict[str, Any], missing: str) -> None:
    del record[missing]
    with pytest.raises(KeyError):
        statement(record, {}, FILES)


def test_no_path_and_no_token_leaves_the_machine(record: dict[str, Any]) -> None:
    hostile = copy.deepcopy(record)
    hostile["source_name"] = "/home/ann/checkpoints/secret-project"
    hostile["versions"]["compress"]["torch"] = "2.13 from /home/ann/wheels hf_abcdefgh12345"
    text = json.dumps(statement(hostile, {"model": {"source": "~/models/mine"}}, FILES))
    assert "secret-project" in text
    assert not [word for word in ("/home", "ann/", "hf_abc", "~") if word in text]


def test_publishing_again_makes_the_same_statement(published: Publishing) -> None:
    before = (published.root / "out" / STATEMENT).read_bytes()
    again = published.run({"folder": str(published.root / "out")}, key="2")
    assert again.file("provenance.json").read_bytes() == before
    assert again.json("receipt.json")["targets"][0]["changed"] is False
    assert str(published.root).encode() not in before
