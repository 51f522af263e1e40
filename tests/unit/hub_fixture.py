"""A loopback Hub and the client set up for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from quantize.hub.client import Access
from quantize.hub.push import Pushed, Target, push
from quantize.listing import LISTING, write_listing
from quantize.store import FileEntry
from tests.hub_server import Account, Fault, Hub, HubServer
from tests.hub_server.repos import Repo

TOKEN = "hf_canaryTokenThatMustNotLeak"
READ_TOKEN = "hf_read"
SCOPED_TOKEN = "hf_scoped"

ACCOUNTS = {
    TOKEN: Account("ann", organisations={"lab": "write", "press": "read"}),
    READ_TOKEN: Account("ann", role="read"),
    SCOPED_TOKEN: Account(
        "ann",
        role="fineGrained",
        scopes=({"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.write"]},),
    ),
}


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may use the network (the loopback interface), and tries no Xet storage."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def hub_server(*faults: Fault, page_size: int = 1000) -> Iterator[HubServer]:
    with HubServer(Hub(ACCOUNTS), faults=faults, page_size=page_size) as server:
        yield server


def access(server: HubServer, token: str | None = TOKEN) -> Access:
    return Access(server.endpoint, token, retry_seconds=(0.01, 0.02))


def write_files(
    folder: Path, contents: Mapping[str, bytes]
) -> tuple[list[FileEntry], dict[str, Path]]:
    """Files on disk with their listing, as the publish stage hands them to `push`."""
    entries, paths = [], {}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        entries.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
        paths[name] = path
    listing = folder / LISTING
    listing.parent.mkdir(parents=True, exist_ok=True)
    entries.append(write_listing(listing, entries))
    paths[LISTING] = listing
    return entries, paths


WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: acme/base\n---\n# A model\n"
CONTENTS = {
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "config.json": b'{"hidden_size": 64}\n',
    "empty.txt": b"",
    "README.md": CARD,
}
TARGET = Target("ann/tiny-awq")
PATTERNS = ("*.safetensors", "*.json", "README.md")
MESSAGE = "Publish tiny-awq"


def publish(
    server: HubServer,
    folder: Path,
    contents: Mapping[str, bytes] = CONTENTS,
    target: Target = TARGET,
    token: str | None = TOKEN,
) -> Pushed:
    entries, paths = write_files(folder, contents)
    return push(access(server, token), target, entries, paths, MESSAGE)


def repository(server: HubServer, target: Target = TARGET) -> Repo:
    return server.hub.repos["model", target.repo]


def remote(server: HubServer, target: Target = TARGET, ref: str = "main") -> dict[str, bytes]:
    tree = repository(server, target).tree(ref)
    return {name: file.content for name, file in tree.items() if name != ".gitattributes"}


def messages(server: HubServer) -> list[str]:
    return repository(server).messages
