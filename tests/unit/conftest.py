"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
from model_server import Model, serving

from quantize.measure.client import Client


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def client(model: Model) -> Iterator[Client]:
    with serving(model) as url:
        client = Client(url, "model")
        yield client
        client.close()
