"""A loopback Hub and the client set up for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from quantize.hub import Access
from quantize.listing import LISTING, write_listing
from quantize.store import FileEntry
from tests.hub_server import Account, Fault, Hub, HubServer

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
