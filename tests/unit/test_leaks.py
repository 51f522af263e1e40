"""The search for leaked secrets and paths finds what is planted, however it is written."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.leaks import files, found

CANARIES = {"token": "hf_canary", "place": "/home/ann/work folder/ü"}

WAYS: dict[str, Callable[[str], bytes]] = {
    "raw": lambda text: text.encode(),
    "url": lambda text: quote(text, safe="").encode(),
    "json": lambda text: json.dumps({"a": text}).encode(),
    "json with slashes": lambda text: text.replace("/", r"\/").encode(),
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64, one before": lambda text: base64.b64encode(b"x" + text.encode() + b"y"),
    "base64, two before": lambda text: base64.b64encode(b"xx" + text.encode()),
    "base64 for urls": lambda text: base64.urlsafe_b64encode(b"x" + text.encode()),
}


@pytest.mark.parametrize("name", CANARIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_planted_canary_is_found(tmp_path: Path, way: str, name: str) -> None:
    written = b"before " + WAYS[way](CANARIES[name]) + b" after"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(written)
    (tmp_path / "other").write_bytes(b"nothing")
    assert found(files(tmp_path), CANARIES) == {f"{name} in {tmp_path / 'sub' / 'file'}"}
    assert found([("request", written)], CANARIES) == {f"{name} in request"}


def test_inside_of_archives_and_pictures() -> None:
    archive = io.BytesIO()
    np.savez_compressed(archive, text=np.array(["hf_canary"] * 50).astype("S"))
    picture = io.BytesIO()
    Figure().savefig(picture, format="png", metadata={"Comment": "hf_canary ü" * 50})
    assert b"hf_canary" not in archive.getvalue()
    texts = [("a", archive.getvalue()), ("b", picture.getvalue())]
    assert found(texts, CANARIES) == {"token in a", "token in b"}


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hf_canar /home/ann/work")
    assert found(files(tmp_path), CANARIES) == set()
    assert list(files(tmp_path, since=(tmp_path / "file").stat().st_mtime + 1)) == []
