"""A Hub on this machine: the part of the protocol that huggingface_hub 1.x and 2.x need here.

In tests it runs in a thread (:class:`HubServer`); by hand::

    python -m tests.hub_server --port 8088 --token hf_test
    HF_ENDPOINT=http://127.0.0.1:8088 HF_TOKEN=hf_test quantize run ...

State is in memory: :mod:`state`, :mod:`repos`, :mod:`accounts`, :mod:`cards`. The protocol is in
:mod:`routes_repo`, :mod:`routes_upload`, :mod:`routes_read`, :mod:`routes_community`; what goes
wrong in :mod:`faults`. It has no Xet storage, no spaces, and no rate limits but planned ones.
"""

from tests.hub_server.faults import Fault, Gate, PlanError, load_plan
from tests.hub_server.messages import Seen
from tests.hub_server.server import HubServer
from tests.hub_server.state import Account, Hub, Limits, Refused

__all__ = [
    "Account",
    "Fault",
    "Gate",
    "Hub",
    "HubServer",
    "Limits",
    "PlanError",
    "Refused",
    "Seen",
    "load_plan",
]
