"""Whether the recipe's server can be started here, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_server import Model, serving

from quantize.errors import CredentialsError, ResourceError
from quantize.server_checks import check_serving
from quantize.serving import Endpoint, Endpoints, Serve


def url(base: str, key: str | None = None) -> Serve:
    end = Endpoint(url=base, model="model", api_key_variable=key)
    return Serve(engine="url", endpoints=Endpoints(baseline=end, candidate=end))


def test_vllm_and_llamacpp_are_ours() -> None:
    for engine in ("vllm", "llamacpp"):
        told = check_serving(Serve(engine=engine), "cpu", None, None, online=False)
        assert told.findings == []


@pytest.mark.parametrize(
    ("engine", "accelerator", "says"),
    [
        ("tgi", "cuda", ["no text-generation-launcher here", "Local install"]),
        ("ollama", "cpu", ["no ollama here", "docs.ollama.com/linux"]),
        ("sglang", "cpu", ["SGLang takes safetensors on cuda alone", "docs/servers.md"]),
    ],
)
def test_a_server_that_is_not_here(
    engine: str, accelerator: str, says: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    serve = Serve.model_validate({"engine": engine})
    (found,) = check_serving(serve, accelerator, None, None, online=False).findings
    assert found.error is ResourceError
    assert says[0] in found.message
    assert says[1] in found.hint


def test_a_server_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ollama").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_serving(Serve(engine="ollama"), "cpu", None, None, online=False).findings == []


def test_endpoints_are_asked_for_their_model() -> None:
    model = Model()
    with serving(model) as base:
        assert check_serving(url(base), "cpu", None, None, online=True).findings == []
        assert "offline" in check_serving(url(base), "cpu", None, None, online=False).unchecked
        assert model.requests == []  # names alone
        end = Endpoint(url=base, model="other")
        serve = Serve(engine="url", endpoints=Endpoints(baseline=end, candidate=end))
        with pytest.raises(ResourceError, match="serves model, and not other"):
            check_serving(serve, "cpu", None, None, online=True)


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(CredentialsError, match="A_KEY is not set"):
        check_serving(url("http://127.0.0.1:1", "A_KEY"), "cpu", None, None, online=False)
