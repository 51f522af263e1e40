"""Xet storage, where the Hub has it: a token for it, then xorbs and shards in place of LFS.

What the client may do without is answered with 404, which it takes as no: chunks that are known
from elsewhere, uploads straight into a bucket, shards whose progress is told.
"""

from __future__ import annotations

import time

from tests.hub_server.accounts import Refused
from tests.hub_server.messages import API, Answer, Asked
from tests.hub_server.repos import File, Repo
from tests.hub_server.xet import files_of

TOKEN = "xet:"
"""What the storage's own tokens begin with; the repository's name follows."""
WITHOUT_ACCOUNT = ("/_cas/", "/v1/telemetry")
"""Paths that know these tokens alone."""


def write_token(asked: Asked) -> Answer:
    repo = asked.proposable()
    if not asked.hub.xet:
        raise Refused(404, "no Xet storage here")
    cas = f"{asked.server.endpoint}/_cas"
    expires = int(time.time()) + 3600
    return Answer({"casUrl": cas, "accessToken": f"{TOKEN}{repo.id}", "exp": expires})


def xorb(asked: Asked) -> Answer:
    _repo(asked)
    name = asked.match["hash"]
    inserted = name not in asked.hub.xorbs
    asked.hub.xorbs[name] = asked.body
    return Answer({"was_inserted": inserted})


def shard(asked: Asked) -> Answer:
    """The files of a shard become objects of the repository, if all their bytes are right."""
    repo = _repo(asked)
    files = [(file.sha256, file.content(asked.hub.xorbs)) for file in files_of(asked.body)]
    for sha256, content in files:
        if File(content, lfs=True).sha256 != sha256:
            raise Refused(400, f"the bytes of {sha256} have another sha256")
    missing = [content for sha256, content in files if sha256 not in repo.objects]
    asked.hub.check_storage(repo, sum(map(len, missing)))
    repo.objects.update(files)
    return Answer({"result": 1})


def telemetry(asked: Asked) -> Answer:
    return Answer({})


def _repo(asked: Asked) -> Repo:
    token = (asked.headers.get("Authorization") or "").removeprefix("Bearer ")
    repo = asked.hub.repos.get(("model", token.removeprefix(TOKEN)))
    if not token.startswith(TOKEN) or repo is None:
        raise Refused(401, "not a token of this storage")
    return repo


ROUTES = [
    ("GET", API + r"/xet-write-token/(?P<revision>[^/]+)", write_token),
    ("POST", r"/_cas/v1/xorbs/default/(?P<hash>[0-9a-f]{64})", xorb),
    ("POST", r"/_cas/v1/shards", shard),
    ("POST", r"/v1/telemetry", telemetry),
]
