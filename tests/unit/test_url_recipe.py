"""`publish.url` from the recipe to the preflight, the stage's key, its receipt, and a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import recipe, write_checkpoint

from quantize.checklist import preflight
from quantize.errors import ConflictError, CredentialsError, RecipeError, ResourceError
from quantize.process import child_environment
from quantize.recipe_file import load_recipe
from quantize.stages import publish
from quantize.stages.base import Resolved

RECIPE = """\
version: 1
name: tiny
model: {source: acme/tiny}
quantize: {method: rtn}
publish:
  url: URL
"""


def load(folder: Path, url: str) -> str | None:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("URL", f'"{url}"'))
    return load_recipe(path).publish.url


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/models/tiny",
        "gs://bucket/x",
        "sftp://ann@host:22/srv/models",
        "file:///mnt/models",
        "abfs://container@account.dfs.core.windows.net/x",
    ],
)
def test_urls_that_may_be(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, url) == url
    assert load(tmp_path, url + "/") == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("out/folder", "expected a URL such as s3://bucket/prefix"),
        ("S3://bucket", "expected a URL such as"),
        ("s3://", "names no place"),
        ("s3:///", "names no place"),
        ("file:///", "absolute path"),
        ("file://out/x", "absolute path"),
        ("https://bucket.s3.amazonaws.com/x", "set AWS_ENDPOINT_URL"),
        ("hf://acme/tiny", r"use publish\.hub"),
        ("s3://AKIA:canary-secret@bucket/x", "a URL with a password"),
        ("sftp://ann:canary-secret@host/x", "a URL with a password"),
        ("abfs://c/x?sig=canary-secret", "a plain URL"),
        ("simplecache::s3://bucket/x", "expected a"),
        ("s3://bucket/x#canary-secret", "a plain URL"),
    ],
)
def test_urls_that_cannot_be(tmp_path: Path, url: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        load(tmp_path, url)
    assert "recipe.yaml:6: publish.url" in caught.value.message
    assert "canary-secret" not in caught.value.message
    with pytest.raises(RecipeError, match=why) as caught:
        load_recipe(tmp_path / "recipe.yaml", [f"publish.url={url}"])
    assert "canary-secret" not in caught.value.message


def wanted(tmp_path: Path, url: str, **publish: Any) -> Resolved:
    given = recipe(quantize={"method": "rtn", "group_size": 32}, publish={"url": url, **publish})
    return Resolved(given, tmp_path, "cpu", {}, {"model": write_checkpoint(tmp_path / "model")})


def test_preflight_looks_at_the_place(tmp_path: Path) -> None:
    target = tmp_path / "out"
    given = wanted(tmp_path, f"file://{target}")
    preflight(given, tmp_path)
    assert not target.exists()
    target.mkdir()
    (target / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ConflictError, match=r"thesis\.tex"):
        preflight(given, tmp_path)
    preflight(given, tmp_path, {"compress"})  # published already
    preflight(given, tmp_path, online=False)


def test_preflight_without_the_backend(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="is not installed") as caught:
        preflight(wanted(tmp_path, "gs://bucket/x"), tmp_path)
    assert caught.value.hint == "pip install 'gcsfs'"


def test_preflight_reports_with_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    given = wanted(tmp_path, f"file://{tmp_path}/out", hub={"repo": "ann/tiny"})
    with pytest.raises(CredentialsError, match="2 things") as caught:
        preflight(given, tmp_path)
    assert "may not be written" in caught.value.message
    assert "there is no token" in caught.value.message


def test_the_endpoint_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = wanted(tmp_path, "s3://bucket/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    amazon = publish.key_inputs(given, "publish")
    assert amazon["url"] == {"url": "s3://bucket/x", "endpoint": None}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://ann:canary-secret@minio:9000/")
    assert publish.key_inputs(given, "publish")["url"]["endpoint"] == "http://minio:9000"
    elsewhere = replace(given, recipe=recipe(publish={"url": "file:///mnt/x"}))
    assert publish.key_inputs(elsewhere, "publish")["url"]["endpoint"] is None


def test_tools_get_no_credentials_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS_TOKEN"):
        monkeypatch.setenv(name, "canary-secret")
    kept: dict[str, Any] = child_environment({})
    assert "canary-secret" not in kept.values()
