"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from model_server import Model, serving

from quantize.measure.client import Client, VllmClient
from quantize.recipe_file import load_recipe
from quantize.resolve import resolve
from quantize.stages.base import Resolved
from tests.unit.planning import TINY, Tiny


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def client(model: Model) -> Iterator[Client]:
    with serving(model) as url:
        client = VllmClient(url, "model")
        yield client
        client.close()


@pytest.fixture(scope="module")
def hash_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "hashes.json"


@pytest.fixture
def tiny(hash_cache: Path) -> Tiny:
    """A shipped recipe with overrides, offline."""

    def resolved(*overrides: str, recipe: Path = TINY, accelerator: str = "cpu") -> Resolved:
        parsed = load_recipe(recipe, overrides)
        return resolve(parsed, recipe, accelerator, online=False, cache_path=hash_cache)

    return resolved


@pytest.fixture(autouse=True)
def same_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that serves 4-bit weights, whichever runs the tests: plans depend on it."""
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
