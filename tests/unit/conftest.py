"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
from model_server import Model, serving

from quantize.measure.client import Client, VllmClient


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def client(model: Model) -> Iterator[Client]:
    with serving(model) as url:
        client = VllmClient(url, "model")
        yield client
        client.close()


@pytest.fixture(autouse=True)
def same_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that serves 4-bit weights, whichever runs the tests: plans depend on it."""
    monkeypatch.setattr("quantize.servers.cpu_has", {"avx512f"}.__contains__)
