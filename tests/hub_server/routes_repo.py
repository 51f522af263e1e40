"""Accounts, repositories and what points to commits."""

from __future__ import annotations

from urllib.parse import unquote

from tests.hub_server.accounts import Refused
from tests.hub_server.messages import API, Answer, Asked


def whoami(asked: Asked) -> Answer:
    return Answer(asked.someone().whoami())


def create_repo(asked: Asked) -> Answer:
    body, account = asked.json(), asked.someone()
    repo_id = f"{body.get('organization') or account.name}/{body['name']}"
    if not account.may_write(repo_id):
        raise Refused(403, f"You don't have the rights to create a model under {repo_id}")
    private = body.get("private") or body.get("visibility") == "private"
    try:
        asked.hub.create(body.get("type") or "model", repo_id, bool(private))
        status = 200
    except Refused as refused:
        status = refused.status
    url = f"{asked.server.endpoint}/{repo_id}"
    return Answer({"url": url, "name": repo_id}, status=status)


def settings(asked: Asked) -> Answer:
    repo, body = asked.writable(), asked.json()
    if "visibility" in body or "private" in body:
        repo.private = body.get("visibility") == "private" or bool(body.get("private"))
    repo.gated = body.get("gated", repo.gated)
    return Answer({"private": repo.private, "gated": repo.gated})


def repo_info(asked: Asked) -> Answer:
    repo = asked.readable()
    commit = repo.resolve(unquote(asked.match["revision"] or "main"))
    tree = repo.tree(commit)
    return Answer(
        {
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "cardData": repo.card(commit),
            "usedStorage": sum(len(content) for content in repo.objects.values()),
            "siblings": [{"rfilename": name} for name in sorted(tree)],
        }
    )


def refs(asked: Asked) -> Answer:
    repo = asked.readable()

    def listed(prefix: str, commits: dict[str, str]) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"{prefix}{name}", "targetCommit": commit}
            for name, commit in commits.items()
        ]

    found = {
        "branches": listed("refs/heads/", repo.branches),
        "converts": [],
        "tags": listed("refs/tags/", repo.tags),
    }
    if asked.asks("include_prs"):
        numbers = {ref.rpartition("/")[2]: commit for ref, commit in repo.pull_heads.items()}
        found["pullRequests"] = listed("refs/pr/", numbers)
    return Answer(found)


def create_branch(asked: Asked) -> Answer:
    repo, branch = asked.writable(), asked.part("branch")
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    start = (asked.json() if asked.body else {}).get("startingPoint", "main")
    repo.branches[branch] = repo.resolve(start)
    return Answer({})


def delete_branch(asked: Asked) -> Answer:
    repo, branch = asked.writable(), asked.part("branch")
    if branch == "main" or repo.branches.pop(branch, None) is None:
        raise Refused(404, f"Reference does not exist: {branch}")
    return Answer({})


def create_tag(asked: Asked) -> Answer:
    repo, tag = asked.writable(), asked.json()["tag"]
    commit = repo.resolve(asked.part("revision"))
    if tag in repo.tags:
        raise Refused(409, f"Tag reference exists already: {tag}")
    repo.tags[tag] = commit
    return Answer({})


def delete_tag(asked: Asked) -> Answer:
    if asked.writable().tags.pop(asked.part("tag"), None) is None:
        raise Refused(404, "Tag does not exist")
    return Answer({})


ROUTES = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("PUT", API + r"/settings", settings),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", repo_info),
    ("GET", API + r"/refs", refs),
    ("POST", API + r"/branch/(?P<branch>[^/]+)", create_branch),
    ("DELETE", API + r"/branch/(?P<branch>[^/]+)", delete_branch),
    ("POST", API + r"/tag/(?P<revision>[^/]+)", create_tag),
    ("DELETE", API + r"/tag/(?P<tag>[^/]+)", delete_tag),
]
