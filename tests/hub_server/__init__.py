"""A Hub on this machine: the part of the protocol that huggingface_hub 1.x and 2.x need here.

In tests it runs in a thread (:class:`HubServer`); by hand::

    python -m tests.hub_server --port 8088 --token hf_test
    HF_ENDPOINT=http://127.0.0.1:8088 HF_TOKEN=hf_test quantize run ...

What it does not have: Xet storage, pull requests, tags, rate limits other than planned faults.
"""

from tests.hub_server.server import Fault, HubServer, Seen
from tests.hub_server.state import Account, Hub, Refused

__all__ = ["Account", "Fault", "Hub", "HubServer", "Refused", "Seen"]
