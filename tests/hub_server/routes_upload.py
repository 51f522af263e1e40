"""Sending: checks beforehand, LFS objects whole or in parts, commits.

Objects stay when their upload is over, with or without a commit that names them: a client that was
killed and comes back is told that they are there. Parts of an upload that was not completed are
not taken over by the next one, as in S3.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import secrets

from tests.hub_server.accounts import Refused
from tests.hub_server.cards import check_card
from tests.hub_server.messages import API, REPO, Answer, Asked
from tests.hub_server.repos import File, Repo

SIGNATURE = "secret"
OBJECT = r"/_lfs/" + REPO + r"/(?P<oid>[0-9a-f]{64})"


def validate_yaml(asked: Asked) -> Answer:
    findings = check_card(asked.json()["content"])
    answer = {
        "errors": [{"message": message} for message in findings.errors],
        "warnings": [{"message": message} for message in findings.warnings],
    }
    return Answer(answer, status=400 if findings.errors else 200)


def preupload(asked: Asked) -> Answer:
    repo, body = asked.proposable(), asked.json()
    revision = asked.part("revision")
    tree = repo.tree(revision)
    names = [file["path"] for file in body["files"]]
    ignored = asked.hub.ignored(repo, revision, names, body.get("gitIgnore"))
    files = []
    for file in body["files"]:
        mode = asked.hub.upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
        there = tree.get(file["path"])
        entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in ignored}
        files.append(entry | ({"oid": there.etag} if there else {}))
    return Answer({"files": files})


def lfs_batch(asked: Asked) -> Answer:
    body = asked.json()
    repo = asked.writable() if "ref" in body else asked.readable()  # without: for a pull request
    asked.someone()
    missing = [item for item in body["objects"] if item["oid"] not in repo.objects]
    asked.hub.check_storage(repo, sum(item["size"] for item in missing))
    objects = []
    for item in body["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item in missing:
            entry["actions"] = {
                "upload": _upload_action(asked, repo, item["oid"], item["size"]),
                "verify": {"href": f"{asked.server.endpoint}/_lfs/{repo.id}/verify"},
            }
        objects.append(entry)
    multipart = any("header" in entry.get("actions", {}).get("upload", {}) for entry in objects)
    return Answer({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _upload_action(asked: Asked, repo: Repo, oid: str, size: int) -> dict[str, object]:
    """Where the object goes: one address, or one for each part and one that completes."""
    address = f"{asked.server.endpoint}/_lfs/{repo.id}/{oid}"
    limits = asked.hub.limits
    if size < limits.multipart_bytes:
        return {"href": f"{address}?signature={SIGNATURE}"}
    upload = secrets.token_hex(8)
    repo.parts[oid, upload] = {}
    header = {"chunk_size": str(limits.part_bytes)}
    for number in range(1, math.ceil(size / limits.part_bytes) + 1):
        header[f"{number:05}"] = f"{address}/{upload}/{number}?signature={SIGNATURE}"
    return {"href": f"{address}/{upload}/complete?signature={SIGNATURE}", "header": header}


def lfs_put(asked: Asked) -> Answer:
    _store(_signed(asked), asked.part("oid"), asked.body)
    return Answer({})


def lfs_part(asked: Asked) -> Answer:
    parts = _parts(_signed(asked), asked)
    parts[int(asked.part("number"))] = asked.body
    return Answer({}, headers={"ETag": _part_etag(asked.body)})


def lfs_complete(asked: Asked) -> Answer:
    repo = _signed(asked)
    parts = _parts(repo, asked)
    named = {part["partNumber"]: part["etag"] for part in asked.json()["parts"]}
    if named != {number: _part_etag(content) for number, content in parts.items()}:
        raise Refused(400, "InvalidPart: the parts are not those that were sent")
    _store(repo, asked.part("oid"), b"".join(parts[number] for number in sorted(parts)))
    return Answer({"success": True})


def lfs_verify(asked: Asked) -> Answer:
    """The object is there with the bytes that its address promises, or it is thrown away."""
    item, repo = asked.json(), asked.readable()
    if repo.unverified.pop(item["oid"], None) is not None:
        raise Refused(400, f"the bytes of {item['oid']} have another sha256")
    if len(repo.objects.get(item["oid"], b"")) != item["size"]:
        raise Refused(404, "object not found")
    return Answer({})


def commit(asked: Asked) -> Answer:
    repo, revision = asked.proposable(), asked.part("revision")
    if len(asked.body) > asked.hub.limits.commit_bytes:
        raise Refused(413, "Payload Too Large: files of this size belong into LFS")
    try:
        lines = [json.loads(line) for line in asked.body.splitlines()]
    except ValueError as error:
        raise Refused(400, f"the commit is not JSON lines: {error}") from error
    url = f"{asked.server.endpoint}/{repo.id}"
    if asked.asks("create_pr"):
        pull = repo.propose(revision, lines, asked.someone().name)
        oid = repo.resolve(pull.ref)
        made = {"pullRequestUrl": f"{url}/discussions/{pull.number}"}
    else:
        oid, made = asked.hub.apply(repo, revision, lines), {}
    return Answer({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **made})


def _signed(asked: Asked) -> Repo:
    """The repository of a signed address, which takes no other credentials, as S3 does not."""
    if asked.query.get("signature") != [SIGNATURE]:
        raise Refused(403, "SignatureDoesNotMatch")
    if "Authorization" in asked.headers:
        raise Refused(400, "InvalidArgument: only one auth mechanism allowed")
    repo = asked.hub.repos.get(("model", asked.part("repo")))
    if repo is None:
        raise Refused(404, "NoSuchBucket")
    return repo


def _parts(repo: Repo, asked: Asked) -> dict[int, bytes]:
    key = (asked.part("oid"), asked.part("upload"))
    if key not in repo.parts:
        raise Refused(404, "NoSuchUpload")
    return repo.parts[key]


def _store(repo: Repo, oid: str, content: bytes) -> None:
    right = File(content, lfs=True).sha256 == oid
    (repo.objects if right else repo.unverified)[oid] = content


def _part_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


ROUTES = [
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", commit),
    ("POST", "/" + REPO + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", r"/_lfs/" + REPO + r"/verify", lfs_verify),
    ("PUT", OBJECT, lfs_put),
    ("PUT", OBJECT + r"/(?P<upload>\w+)/(?P<number>\d+)", lfs_part),
    ("POST", OBJECT + r"/(?P<upload>\w+)/complete", lfs_complete),
]
