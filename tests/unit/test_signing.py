"""Signatures: made with real keys, verified by the library's own command, never made twice."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hub_fixture import TOKEN, hub_server, online
from huggingface_hub import HfApi
from published_fixture import Publishing, write_key
from pydantic import ValidationError
from records_fixture import RECIPE, resolved_recipe

import quantize
from quantize import process
from quantize.checklist import preflight
from quantize.errors import ConflictError, CredentialsError, ResourceError, TransientError
from quantize.listing import SIGNATURE
from quantize.signing import findings, identify, library
from quantize.stages import publish
from quantize.targets import Publish, Sign

PASSWORD = "correct horse/battery+staple"


@pytest.fixture(scope="module")
def publishing(tmp_path_factory: pytest.TempPathFactory) -> Publishing:
    return Publishing(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path)


def verified_by_the_command(folder: Path, public: Path) -> bool:
    """What the docs tell a reader to type."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / SIGNATURE), "--public_key", str(public)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_the_librarys_own_command_verifies_a_downloaded_folder(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: Any
) -> None:
    monkeypatch.setenv("KEY_PASSWORD", PASSWORD)
    private, public = write_key(tmp_path, PASSWORD, curve)
    out = tmp_path / "out"
    sign = {"key": str(private), "password_variable": "KEY_PASSWORD"}
    publishing.run({"folder": str(out), "sign": sign})
    # What the Hub and its client add to a download.
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("a cache\n")
    assert verified_by_the_command(out, public)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card + " ")
    assert not verified_by_the_command(out, public)
    (out / "README.md").write_text(card)
    (out / "modeling_extra.py").write_text("print()\n")
    assert not verified_by_the_command(out, public)


def test_publishing_again_signs_nothing_again(
    publishing: Publishing, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    block = {"folder": str(tmp_path / "out"), "sign": {"key": str(keys[0])}}
    publishing.run(block, key="a")
    before = (tmp_path / "out" / SIGNATURE).read_bytes()
    again = publishing.run(block, key="b")
    assert (tmp_path / "out" / SIGNATURE).read_bytes() == before
    assert again.json("receipt.json")["targets"][0]["changed"] is False
    # A signature by another key, or of other files, is no reason not to sign.
    (tmp_path / "other").mkdir()
    other, public = write_key(tmp_path / "other")
    publishing.run(block | {"sign": {"key": str(other)}}, key="c")
    assert (tmp_path / "out" / SIGNATURE).read_bytes() != before
    assert verified_by_the_command(tmp_path / "out", public)


def test_a_signature_survives_a_run_that_fails_after_it(
    publishing: Publishing, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    out.write_text("a file in the folder's place")
    block = {"folder": str(out), "sign": {"key": str(keys[0])}}
    with pytest.raises(ConflictError):
        publishing.run(block, key="f")
    kept = publishing.store.root / "publish" / ".staging" / "f" / "work" / "model.sig"
    signature = kept.read_bytes()
    out.unlink()
    publishing.run(block, key="f")
    assert (out / SIGNATURE).read_bytes() == signature


def test_the_hubs_signature_is_taken_when_the_store_is_lost(
    publishing: Publishing,
    tmp_path: Path,
    keys: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    online(monkeypatch)
    block = {"hub": {"repo": "ann/tiny"}, "sign": {"key": str(keys[0])}}
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        first = publishing.run(block, key="g")
        assert server.count("POST .*/commit/") == 1
        second = publishing.run(block, key="h")  # knows nothing of the first
        assert server.count("POST .*/commit/") == 1
        assert second.file("model.sig").read_bytes() == first.file("model.sig").read_bytes()
        # Without `sign` the next publish takes the signature away.
        publishing.run({"hub": {"repo": "ann/tiny"}}, key="i")
        assert SIGNATURE not in HfApi(server.endpoint, TOKEN).list_repo_files("ann/tiny")


def test_no_key_no_path_and_no_password_in_anything_that_is_written(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys-of-ann").mkdir()
    private, _ = write_key(tmp_path / "keys-of-ann", PASSWORD)
    monkeypatch.setenv("KEY_PASSWORD", PASSWORD)
    sign = {"key": str(private), "password_variable": "KEY_PASSWORD"}
    made = publishing.run({"folder": str(tmp_path / "out"), "sign": sign}, key="secret")
    secrets = [PASSWORD.encode(), b"keys-of-ann", private.read_bytes().split(b"\n")[1]]
    forms = [form for secret in secrets for form in encoded(secret)]
    for folder in (tmp_path / "out", made.path):
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not [form for form in forms if form in content], path


def encoded(secret: bytes) -> list[bytes]:
    return [secret, base64.b64encode(secret), urllib.parse.quote(secret, safe="").encode()]


def test_tools_do_not_see_the_variables_that_the_recipe_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEYS_OPENER", PASSWORD)
    monkeypatch.setattr(process, "_withheld", set())
    assert "MY_KEYS_OPENER" in process.child_environment({})
    block = Publish(sign=Sign(key="k", password_variable="MY_KEYS_OPENER"))
    process.withhold(block.secret_variables)
    assert "MY_KEYS_OPENER" not in process.child_environment({})


def pem(key: Any) -> bytes:
    return bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def no_key(folder: Path) -> dict[str, str]:
    return {"key": str(folder / "absent.pem")}


def public_key(folder: Path) -> dict[str, str]:
    return {"key": str(write_key(folder)[1])}


def wrong_password(folder: Path) -> dict[str, str]:
    private, _ = write_key(folder, "another one")
    return {"key": str(private), "password_variable": "KEY_PASSWORD"}


def password_missing(folder: Path) -> dict[str, str]:
    return {"key": str(write_key(folder, PASSWORD)[0])}


def password_for_an_open_key(folder: Path) -> dict[str, str]:
    return {"key": str(write_key(folder)[0]), "password_variable": "KEY_PASSWORD"}


def rsa_key(folder: Path) -> dict[str, str]:
    path = folder / "rsa.pem"
    path.write_bytes(pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)))
    return {"key": str(path)}


def foreign_curve(folder: Path) -> dict[str, str]:
    return {"key": str(write_key(folder, curve=ec.SECP256K1())[0])}


def variable_not_set(folder: Path) -> dict[str, str]:
    return {"key": str(write_key(folder)[0]), "password_variable": "NOT_SET_AT_ALL"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_key, "No such file"),
        (public_key, "is no private key in PEM"),
        (wrong_password, "does not open"),
        (password_missing, "has a password"),
        (password_for_an_open_key, "has no password"),
        (rsa_key, "is not on secp256r1"),
        (foreign_curve, "is not on secp256r1"),
        (variable_not_set, "NOT_SET_AT_ALL"),
    ],
)
def test_a_key_that_cannot_sign_is_found_before_anything_runs(
    make: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publishing: Publishing
) -> None:
    monkeypatch.setenv("KEY_PASSWORD", PASSWORD)
    sign = Sign(**make(tmp_path))
    [finding] = findings(sign, online=False)
    assert (finding.error, said in finding.message) == (CredentialsError, True), finding
    assert finding.hint
    assert PASSWORD not in finding.message + finding.hint
    with pytest.raises(CredentialsError):
        identify(sign)


def test_preflight_asks_only_where_something_is_published(
    tmp_path: Path, publishing: Publishing
) -> None:
    block = {"folder": "out", "sign": {"key": str(tmp_path / "absent.pem")}}
    resolved = resolved_recipe(tmp_path, {**RECIPE, "publish": block})
    preflight(resolved, tmp_path / "store", {"measure"})
    with pytest.raises(CredentialsError, match=r"absent\.pem"):
        preflight(resolved, tmp_path / "store", {"publish"})


def test_the_stages_key_knows_the_public_key_alone(keys: tuple[Path, Path], tmp_path: Path) -> None:
    digest = identify(Sign(key=str(keys[0])))
    moved = tmp_path / "moved.pem"
    keys[0].rename(moved)
    assert identify(Sign(key=str(moved))) == digest
    assert digest == library().fingerprint(
        serialization.load_pem_private_key(moved.read_bytes(), None)
    )
    (tmp_path / "other").mkdir()
    assert identify(Sign(key=str(write_key(tmp_path / "other")[0]))) != digest
    recipe = {**RECIPE, "publish": {"folder": "out", "sign": {"key": str(moved)}}}
    resolved = replace(resolved_recipe(tmp_path, recipe), digests={"sign": digest})
    assert publish.key_inputs(resolved, "publish") == {"folder": "out", "sign": digest}


def test_without_the_extra_the_command_that_installs_it(
    keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.delitem(sys.modules, "quantize.model_signature", raising=False)
    monkeypatch.delattr(quantize, "model_signature", raising=False)
    [finding] = findings(Sign(key=str(keys[0])), online=False)
    assert finding.error is ResourceError
    assert finding.hint == "pip install 'quantize[sign]'"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "either key, or keyless"),
        ({"key": "k", "keyless": True}, "either key, or keyless"),
        ({"keyless": True, "password_variable": "P"}, "password_variable without key"),
        ({"key": "k", "identity_token_variable": "T"}, "is for keyless"),
        ({"key": "k", "password_variable": "not a name"}, "should match pattern"),
    ],
)
def test_mistakes_of_the_block(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Sign(**values)


# Keyless: as far as it goes without Sigstore's services.


def token(seconds: int, audience: str = "sigstore") -> str:
    now = int(time.time())
    claims = {"aud": audience, "iss": "https://issuer.example", "sub": "ann", "iat": now - 60}
    return jwt.encode(claims | {"exp": now + seconds}, "a secret of thirty-two bytes or more")


KEYLESS = Sign(keyless=True, identity_token_variable="IDENTITY_TOKEN")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "is not set"),
        ("no-token-at-all", "malformed"),
        (token(-30), "malformed"),  # the client says so of an expired one
        (token(600, audience="another"), "malformed"),
    ],
)
def test_an_identity_that_cannot_sign(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDENTITY_TOKEN", value)
    [finding] = findings(KEYLESS, online=False)
    assert (finding.error, said in finding.message) == (CredentialsError, True), finding
    assert not value or value not in finding.message


def test_no_identity_outside_of_a_ci_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "BUILDKITE", "SIGSTORE_ID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    [finding] = findings(Sign(keyless=True), online=False)
    assert (finding.error, "there is none" in finding.message) == (CredentialsError, True)


def test_sigstore_out_of_reach_may_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IDENTITY_TOKEN", token(600))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    assert findings(KEYLESS, online=False) == []
    [finding] = findings(KEYLESS, online=True)
    assert finding.error is TransientError
    assert identify(KEYLESS) == "keyless"
