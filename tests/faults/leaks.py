"""Looking for a secret, however it is written."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote


def leaks(text: bytes, secret: str) -> bool:
    """Whether the secret is in the text: raw, URL-encoded, in JSON, in base64 at any offset."""
    return any(form in text for form in forms(secret))


def forms(secret: str) -> set[bytes]:
    """The ways to write a secret that are looked for.

    In base64 three bytes become four characters: what stands before and after the secret changes
    its first and last character, which are left out.
    """
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw + b"\0" * (-(before + len(raw)) % 3))
        first = (before * 8 + 5) // 6
        last = (before + len(raw)) * 8 // 6
        found |= {encoded[first:last], encoded[first:last].translate(bytes.maketrans(b"+/", b"-_"))}
    return found
