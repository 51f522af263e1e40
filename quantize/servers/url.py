"""An OpenAI-compatible endpoint that is already up: nothing is started, it is asked who it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quantize.errors import CredentialsError
from quantize.servers.base import Launch

if TYPE_CHECKING:
    from quantize.measure.dialects import OpenAIClient
    from quantize.serving import Endpoint

NAME = "url"
ENVIRONMENT = None
PROGRAM = None
INSTALL = "start the endpoint"
READS = "safetensors"
START_SECONDS = 0.0
SCORER = None
COUNTERS = ()
KV_CACHE = None  # an endpoint does not say it
KNOWN_FAILURES = ()  # there is no log


def command(launch: Launch) -> list[str]:
    """Nobody starts it here."""
    return []


def variables(launch: Launch) -> dict[str, str]:
    """See the protocol."""
    return {}


def client(base_url: str, model: str) -> OpenAIClient:
    """An endpoint without a key."""
    from quantize.measure.dialects import OpenAIClient

    return OpenAIClient(base_url, model)


def connect(endpoint: Endpoint, max_model_len: int | None) -> OpenAIClient:
    """A connection to the recipe's endpoint, with its key; the model's name is checked."""
    from quantize.measure.dialects import OpenAIClient

    opened = OpenAIClient(endpoint.base_url, endpoint.model, api_key(endpoint), max_model_len)
    opened.check_model()
    return opened


def api_key(endpoint: Endpoint) -> str | None:
    """What the variable holds that the recipe names; a CredentialsError where it is not set."""
    name = endpoint.api_key_variable
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise CredentialsError(
            f"the environment variable {name} is not set, which serve.endpoints names",
            f"set {name} to the endpoint's key, or remove api_key_variable",
        )
    return value
