"""Signing what is published, with OpenSSF model signing; a part that is installed by choice.

A signature is a Sigstore bundle around an in-toto statement that names every signed file with its
sha256. It covers all published files but itself and the listing (which names it). The library
is in :mod:`quantize.model_signature`, imported when a recipe signs or a signature is verified.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quantize.errors import CredentialsError, QuantizeError, ResourceError
from quantize.findings import Finding

if TYPE_CHECKING:
    from quantize.targets import Sign

INSTALL = "pip install 'quantize[sign]'"
KEYLESS = "keyless"


def library() -> ModuleType:
    """:mod:`quantize.model_signature`; a ResourceError where what it needs is not installed."""
    try:
        from quantize import model_signature
    except ImportError as error:
        raise ResourceError(
            f"signatures need the package model-signing, which is not complete here: {error}",
            INSTALL,
        ) from error
    return model_signature


def identify(sign: Sign) -> str:
    """Who signs, for the stage's key: sha256 of the public key (PEM), or `keyless`.

    Raises ResourceError without the library, CredentialsError for a key that cannot be used.
    """
    if sign.keyless:
        return KEYLESS
    found: str = library().fingerprint(_private_key(sign))
    return found


def findings(sign: Sign, *, online: bool) -> list[Finding]:
    """What would keep a signature from being made, found before anything runs."""
    try:
        if sign.keyless:
            library().check_keyless(_identity_token(sign), online=online)
        else:
            identify(sign)
    except QuantizeError as error:
        return [Finding.of(error)]
    return []


def write_signature(
    sign: Sign, name: str, digests: Mapping[str, str], target: Path, earlier: Iterable[Path]
) -> bool:
    """Make `target` a signature of `digests` (sha256 by file name); False if an earlier one does.

    Signatures with an elliptic-curve key differ each time. So one among `earlier` that this key
    made of the very same files is taken. `name` is what the bundle calls the checkpoint.
    """
    tool = library()
    if sign.keyless:
        tool.sign_keyless(_identity_token(sign), name, digests, target)
        return True
    key = _private_key(sign)
    public = tool.public_pem(key)
    for path in earlier:
        if path.is_file() and not tool.problems_with_key(path, public, name, digests):
            target.write_bytes(path.read_bytes())
            return False
    assert sign.key is not None
    tool.sign_with_key(_key_path(sign), _password(sign), name, digests, target)
    return True


def _key_path(sign: Sign) -> Path:
    assert sign.key is not None
    return Path(sign.key).expanduser()


def _private_key(sign: Sign) -> object:
    try:
        content = _key_path(sign).read_bytes()
    except OSError as error:
        raise CredentialsError(
            f"publish.sign.key: cannot read {sign.key}: {error.strerror or error}",
            "correct the path (it starts at the working directory), or remove publish.sign",
        ) from error
    found: object = library().load_private_key(content, _password(sign), str(sign.key))
    return found


def _password(sign: Sign) -> str | None:
    if sign.password_variable is None:
        return None
    return _variable(sign.password_variable, "publish.sign.password_variable", "the key's password")


def _identity_token(sign: Sign) -> str | None:
    """The token that the recipe's variable holds; None: what the CI system offers."""
    if sign.identity_token_variable is None:
        return None
    where = "publish.sign.identity_token_variable"
    return _variable(sign.identity_token_variable, where, "an OpenID Connect token")


def _variable(name: str, key: str, what: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise CredentialsError(
            f"{key} names {name}, and this environment variable is not set",
            f"set {name} to {what}, or correct {key}",
        )
    return value
