"""Whether a published checkpoint is still what was published: `quantize verify`.

Each check looks at one thing, and says everything that it finds:

- `files`: every file has the size and sha256 of the listing; none is missing, none was added
- `statement`: its subjects are the listed files, and what it says of their making is what the
  record and the recipe say
- `record`: it is complete, and agrees with the recipe and with the files' sizes
- `card`: README.md is what this program makes of the record, line by line
- `tensors`: each safetensors or GGUF file's header accounts for every byte
- `signature`: it is the given key's or identity's, and of exactly these files

A changed figure on the card shows in `files`; where listing and statement were made to fit, in
`card`; where record and card were both made to fit, in `signature` alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from quantize.errors import SourceError
from quantize.gguf.file import read_gguf
from quantize.listing import LISTING, SIGNATURE
from quantize.model_files import is_weights
from quantize.progress import Progress
from quantize.provenance import RECIPE, RECORD
from quantize.tensors import read_header
from quantize.verify.documents import (
    check_card,
    check_record,
    check_statement,
    differs,
    document,
    load_yaml,
)
from quantize.verify.published import Published, is_ours, read_published
from quantize.verify.verification import Check, Problem, Trust, Verification

LARGE_BYTES = 1 << 30
"""From here on reading takes long enough to tell of it."""


def verify_place(
    place: str, revision: str | None, trust: Trust, *, full: bool, progress: Progress
) -> Verification:
    """Read a folder or a repository and verify it; raises what :func:`read_published` raises."""

    def on_progress(done: int, total: int) -> None:
        if total >= LARGE_BYTES:
            progress.step("reading", round(done / 1e9, 2), round(total / 1e9, 2), "GB")

    with read_published(place, revision, full=full, on_progress=on_progress) as published:
        return verify(published, trust)


def verify(published: Published, trust: Trust) -> Verification:
    """Make every check that can be made of what was read."""
    record = document(published, RECORD, json.loads)
    recipe = document(published, RECIPE, load_yaml)
    checks = (
        check_files(published),
        check_statement(published, record, recipe),
        check_record(published, record, recipe),
        check_card(published, record),
        check_tensors(published),
        check_signature(published, trust),
    )
    return Verification(published.place, published.commit, checks)


def check_files(published: Published) -> Check:
    """Listing against what is there."""
    problems = [
        Problem("link", name, f"{name} is a link, which is not followed")
        for name in published.links
        if is_ours(name)
    ]
    for name, entry in sorted(published.listing.items()):
        found = published.found.get(name)
        if found is None:
            if name not in published.links:
                problems.append(Problem("missing", name, f"{name} is missing"))
        elif found.bytes != entry.bytes:
            text = f"{name} was changed: {found.bytes:,} bytes, not {entry.bytes:,}"
            problems.append(Problem("changed", name, text))
        elif found.sha256 != entry.sha256:
            problems.append(Problem("changed", name, f"{name} was changed: another sha256"))
    for name in sorted(published.found.keys() - published.listing.keys() - {LISTING}):
        if is_ours(name):
            problems.append(Problem("added", name, f"{name} was added: it is not in the listing"))
    total = sum(entry.bytes for entry in published.listing.values())
    count = len(published.listing)
    return Check.of("files", f"{count} files, {total:,} bytes, as listed", problems)


def check_tensors(published: Published) -> Check:
    """Headers of the safetensors and GGUF files that are here."""
    names = sorted(name for name in published.listing if is_weights(name))
    here = [name for name in names if name in published.readable]
    if not here and names:
        return Check("tensors", "skipped", "compared by sha256 alone; --full downloads them")
    problems, count = [], 0
    for name in here:
        try:
            path = published.folder / name
            count += len(read_gguf(path).tensors if name.endswith(".gguf") else read_header(path))
        except SourceError as error:
            problems.append(differs(name, error.message))
    return Check.of("tensors", f"headers account for every byte ({count:,} tensors)", problems)


def check_signature(published: Published, trust: Trust) -> Check:
    """The signature against the files' sha256, by the key or the identity that is trusted."""
    if SIGNATURE not in published.readable:
        if not trust.named:
            return Check("signature", "skipped", "not signed")
        text = f"not signed: there is no {SIGNATURE}"
        return Check.of("signature", "", [Problem("missing", SIGNATURE, text)])
    if not trust.named:
        whom = "--key, or --identity and --issuer, say by whom it must be"
        return Check("signature", "skipped", f"signed, not verified: {whom}")
    from quantize.signing import library

    tool, path = library(), published.folder / SIGNATURE
    digests = {
        name: entry.sha256
        for name, entry in published.found.items()
        if name in published.listing and name != SIGNATURE
    }
    if trust.key is not None:
        faults = tool.problems_with_key(path, _public_key(trust.key), "model", digests)
        who = f"by the key {trust.key.name}"
    else:
        faults = tool.problems_with_identity(path, trust.identity, trust.issuer, "model", digests)
        who = f"by {trust.identity}"
    problems = [differs(SIGNATURE, f"{SIGNATURE}: {fault}") for fault in faults]
    return Check.of("signature", f"signed {who}", problems)


def _public_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"cannot read the key {path}: {error.strerror or error}", "correct --key"
        ) from error
