"""The package `model-signing`, made to sign and verify what was hashed already.

The library hashes a folder itself. Here the sha256 of every file is known: from the artifact when
it is published, from the folder or the Hub's own checksums when it is verified. So :class:`Known`
takes the place of its hashing, and 40 GB are not read a second time. What it writes is what the
library's own command verifies. Imported only through :func:`quantize.signing.library`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, manifest, signing, verifying
from model_signing._hashing.hashing import Digest
from sigstore.errors import Error as SigstoreError
from sigstore.oidc import IdentityError, IdentityToken, detect_credential

from quantize.errors import CredentialsError, QuantizeError, SourceError, TransientError
from quantize.listing import LISTING, SIGNATURE

CURVES = ("secp256r1", "secp384r1", "secp521r1")
CLIENT = "sigstore"
"""The audience that an identity token must be made out to."""

IGNORED = (SIGNATURE, LISTING, ".cache", ".git", ".gitattributes", ".github", ".gitignore")
"""Not signed: the signature, the listing that names it, and what git and the Hub's client leave."""


class Known(hashing.Config):
    """Gives the manifest of files whose sha256 are known, instead of reading them."""

    def __init__(self, name: str, digests: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._digests = name, digests
        self.asked = False  # whoever verifies asks once the signature itself is sound

    def hash(
        self, model_path: Any, *, files_to_hash: Iterable[Any] | None = None
    ) -> manifest.Manifest:
        """The manifest of the known files, under their names."""
        self.asked = True
        items = [
            manifest.FileManifestItem(
                path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(sha256))
            )
            for name, sha256 in self._digests.items()
        ]
        how = manifest.SerializationType.from_args(
            {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(IGNORED),
            }
        )
        return manifest.Manifest(self._name, items, how)


def load_private_key(content: bytes, password: str | None, where: str) -> Any:
    """The elliptic-curve key of a PEM file; a CredentialsError that says what else it is."""
    hint = (
        "make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, "
        "and set publish.sign.password_variable where it has a password"
    )
    try:
        key = serialization.load_pem_private_key(content, password.encode() if password else None)
    except TypeError as error:  # a password is missing, or there is one too many
        has = "has a password" if password is None else "has no password"
        raise CredentialsError(f"the key {where} {has}", hint) from error
    except ValueError as error:
        what = "is no private key in PEM" if password is None else "does not open: password or file"
        raise CredentialsError(f"the key {where} {what}", hint) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise CredentialsError(f"the key {where} is not on {', '.join(CURVES)}", hint)
    return key


def public_pem(key: Any) -> bytes:
    """The public key that belongs to a private one."""
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def fingerprint(key: Any) -> str:
    """sha256 of the public key's PEM: what a bundle names its key by."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def sign_with_key(
    key: Path, password: str | None, name: str, digests: Mapping[str, str], target: Path
) -> None:
    """Write the bundle to `target`."""
    # The library hands the password on to a function that takes bytes.
    secret: Any = password.encode() if password else None
    config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    config.set_hashing_config(Known(name, digests)).sign(Path(name), target)


def check_keyless(token: str | None, *, online: bool) -> None:
    """CredentialsError without a usable identity, TransientError where Sigstore is not reached."""
    identity = _identity(token)
    if online:
        _keyless_signer(identity)


def sign_keyless(token: str | None, name: str, digests: Mapping[str, str], target: Path) -> None:
    """Write the bundle, with a certificate of Sigstore and an entry in its public log."""
    config = _keyless_signer(_identity(token)).set_hashing_config(Known(name, digests))
    with _sigstore("signing"):
        config.sign(Path(name), target)


def problems_with_key(
    signature: Path, public_key: bytes, name: str, digests: Mapping[str, str]
) -> list[str]:
    """Why a bundle is not that key's signature of exactly these files; empty if it is."""
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        Path(file.name).write_bytes(public_key)
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=Path(file.name))
        except (ValueError, TypeError, AttributeError) as error:
            raise SourceError(
                "the key is no public key in PEM on one of " + ", ".join(CURVES),
                "`openssl ec -in key.pem -pubout -out key.pub` makes it from a private key",
            ) from error
    return _problems(config, signature, name, digests)


def problems_with_identity(
    signature: Path, identity: str, issuer: str, name: str, digests: Mapping[str, str]
) -> list[str]:
    """Why a bundle is not that identity's signature of exactly these files; empty if it is."""
    with _sigstore("fetching the keys that Sigstore's signatures are verified with"):
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    return _problems(config, signature, name, digests)


def _problems(
    config: verifying.Config, signature: Path, name: str, digests: Mapping[str, str]
) -> list[str]:
    """A signature is a stranger's file: whatever it makes the library raise, it does not verify."""
    known = Known(name, digests)
    try:
        config.set_hashing_config(known).verify(Path(name), signature)
    except InvalidSignature:
        return ["was not made with this key, or was changed"]
    except Exception as error:
        if known.asked and (changed := _changed(signature, digests)):
            return changed
        return [" ".join(str(error).split())[:300] or type(error).__name__]
    return []


def _changed(signature: Path, digests: Mapping[str, str]) -> list[str]:
    """What differs from the files that a sound signature names, in words."""
    bundle = json.loads(signature.read_text(encoding="utf-8"))
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {item["name"]: item["digest"] for item in payload["predicate"]["resources"]}
    found = []
    for file in sorted(signed.keys() | digests.keys()):
        if signed.get(file) != digests.get(file):
            what = "changed" if file in signed and file in digests else "removed"
            what = what if file in signed else "added"
            found.append(f"{file} was {what} after it was signed")
    return found


def _identity(token: str | None) -> str:
    """A token that Sigstore would take, as far as it says so itself."""
    hint = (
        "set publish.sign.identity_token_variable to a variable with a token for the audience "
        f"`{CLIENT}`, or run where the CI system offers one; it must still be valid at the end"
    )
    try:
        found: str | None = token or detect_credential(CLIENT)
        if found is None:
            raise CredentialsError("signing without a key needs an identity; there is none", hint)
        IdentityToken(found, CLIENT)
    except QuantizeError:
        raise
    except Exception as error:  # the ways in which CI systems fail to give one are many
        raise CredentialsError(f"the identity token cannot be used: {error}", hint) from error
    return found


def _keyless_signer(token: str) -> signing.Config:
    with _sigstore("preparing to sign"):
        return signing.Config().use_sigstore_signer(identity_token=token)


class _sigstore:
    """What Sigstore's client raises becomes an error of ours; no message carries the token."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, IdentityError):
            raise CredentialsError(
                f"Sigstore refused the identity while {self._what}: {error}",
                "get a fresh token and run the same command again",
            ) from error
        # Its services, requests and tuf have no common class; a bug of ours is none of these.
        if isinstance(error, (SigstoreError, OSError)) or type(error).__module__.startswith(
            ("sigstore", "tuf", "requests", "urllib3")
        ):
            raise TransientError(
                f"Sigstore cannot be used while {self._what}: {error}",
                "run the same command again; check the network",
            ) from error
