"""Pull requests and collections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.hub_server.accounts import Refused
from tests.hub_server.messages import API, Answer, Asked
from tests.hub_server.repos import PullRequest, Repo
from tests.hub_server.state import Collection

DISCUSSION = API + r"/discussions/(?P<number>\d+)"
COLLECTION = r"/api/collections/(?P<slug>[\w.-]+/[\w.-]+)"
LONG_AGO = "2025-01-01T00:00:00.000Z"
PAGE = 2
"""Discussions on a page: few, so that tests meet a second one. The Hub has more."""


def create_discussion(asked: Asked) -> Answer:
    """A pull request is born as a draft; anybody who may read may open one."""
    repo, account, body = asked.readable(), asked.someone(), asked.json()
    if not body.get("pullRequest"):
        raise Refused(400, "only pull requests are supported here")
    pull = repo.open_pull(body["title"], body.get("description", ""), account.name, "main")
    return Answer({"num": pull.number, "pullRequest": True})


def list_discussions(asked: Asked) -> Answer:
    """Newest first, in pages; `status=open` includes drafts, `closed` what was merged."""
    repo = asked.readable()
    wanted = asked.query.get("status", ["all"])[0]
    groups = {"open": ("open", "draft"), "closed": ("closed", "merged")}
    found = [
        pull
        for _, pull in sorted(repo.pulls.items(), reverse=True)
        if wanted not in groups or pull.status in groups[wanted]
        if asked.query.get("author", [pull.author]) == [pull.author]
        if asked.query.get("type", ["all"])[0] != "discussion"
    ]
    start = int(asked.query.get("p", ["0"])[0]) * PAGE
    page = [_summary(repo, pull) for pull in found[start : start + PAGE]]
    return Answer({"count": len(found), "start": start, "discussions": page})


def discussion(asked: Asked) -> Answer:
    repo = asked.readable()
    pull = _pull(repo, asked)
    changes = {"base": f"refs/heads/{pull.base}", "mergeCommitId": pull.merge_commit}
    comment = {"latest": {"raw": pull.description}, "edited": False, "hidden": False}
    events = [_event(pull, "comment", comment)]
    details = {"changes": changes, "filesWithConflicts": [], "events": events, "diff": ""}
    return Answer(_summary(repo, pull) | details)


def change_status(asked: Asked) -> Answer:
    repo, account = asked.readable(), asked.someone()
    pull, status = _pull(repo, asked), asked.json()["status"]
    if account.name != pull.author and not account.may_write(repo.id):
        raise Refused(403, "You don't have the rights to change this pull request")
    if pull.status == "merged":
        raise Refused(409, "A merged pull request cannot be opened or closed")
    repo.pulls[pull.number] = replace(pull, status=status)
    return Answer({"newStatus": _event(pull, "status-change", {"status": status})})


def change_title(asked: Asked) -> Answer:
    repo = asked.writable()
    pull, title = _pull(repo, asked), asked.json()["title"]
    repo.pulls[pull.number] = replace(pull, title=title)
    return Answer({"newTitle": _event(pull, "title-change", {"from": pull.title, "to": title})})


def comment(asked: Asked) -> Answer:
    pull = _pull(asked.readable(), asked)
    data = {"latest": {"raw": asked.json()["comment"]}, "edited": False, "hidden": False}
    return Answer({"newMessage": _event(pull, "comment", data)})


def merge(asked: Asked) -> Answer:
    repo = asked.writable()
    repo.merge(_pull(repo, asked).number)
    return Answer({})


def get_collection(asked: Asked) -> Answer:
    return Answer(_collection(asked.hub.collection(asked.part("slug"), asked.account)))


def create_collection(asked: Asked) -> Answer:
    body, account = asked.json(), asked.someone()
    if not account.may_write(f"{body['namespace']}/collection"):
        raise Refused(403, f"You cannot create collections for {body['namespace']}")
    try:
        made = asked.hub.create_collection(
            body["title"], body["namespace"], bool(body.get("private"))
        )
    except Refused as refused:  # the client reads the other's slug from the answer
        return Answer({"error": "exists", "slug": refused.message}, status=409)
    return Answer(_collection(made))


def add_item(asked: Asked) -> Answer:
    found = asked.hub.collection(asked.part("slug"), asked.account)
    if not asked.someone().may_write(found.slug):
        raise Refused(403, "You don't have the rights to change this collection")
    body = asked.json()
    kind, name = body["item"]["type"], body["item"]["id"]
    if any(item[:2] == (kind, name) for item in found.items):
        raise Refused(409, "Item already exists in this collection")
    if kind in ("model", "dataset"):
        asked.hub.readable(kind, name, asked.account)
    found.items.append((kind, name, body.get("note")))
    return Answer(_collection(found))


def _pull(repo: Repo, asked: Asked) -> PullRequest:
    number = int(asked.match["number"])
    if number not in repo.pulls:
        raise Refused(404, f"Discussion {number} not found")
    return repo.pulls[number]


def _summary(repo: Repo, pull: PullRequest) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": LONG_AGO,
        "status": pull.status,
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": repo.type},
    }


def _event(pull: PullRequest, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    author = {"name": pull.author}
    return {"id": "0" * 24, "type": kind, "createdAt": LONG_AGO, "author": author, "data": data}


def _collection(found: Collection) -> dict[str, Any]:
    items = [
        {
            "_id": f"{position:024x}",
            "id": name,
            "type": kind,
            "position": position,
            **({"note": {"text": note}} if note else {}),
        }
        for position, (kind, name, note) in enumerate(found.items)
    ]
    return {
        "slug": found.slug,
        "title": found.title,
        "owner": {"name": found.owner},
        "items": items,
        "lastUpdated": LONG_AGO,
        "position": 0,
        "private": found.private,
        "theme": "blue",
        "upvotes": 0,
    }


ROUTES = [
    ("POST", API + r"/discussions", create_discussion),
    ("GET", API + r"/discussions", list_discussions),
    ("GET", DISCUSSION, discussion),
    ("POST", DISCUSSION + r"/status", change_status),
    ("POST", DISCUSSION + r"/title", change_title),
    ("POST", DISCUSSION + r"/comment", comment),
    ("POST", DISCUSSION + r"/merge", merge),
    ("POST", r"/api/collections", create_collection),
    ("GET", COLLECTION, get_collection),
    ("POST", COLLECTION + r"/items", add_item),
]
