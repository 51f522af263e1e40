"""Run the server by hand: ``python -m tests.hub_server --port 8088 --token hf_test``."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from tests.hub_server import Account, Fault, Hub, HubServer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8088)
    parser.add_argument("--token", default="hf_test", help="the one token that may write")
    parser.add_argument("--user", default="tester", help="the namespace of that token")
    parser.add_argument(
        "--faults", type=Path, help='JSON: [{"pattern": "POST .*/commit/", "drop": "after"}, ...]'
    )
    arguments = parser.parse_args()
    plan = json.loads(arguments.faults.read_text()) if arguments.faults else []
    faults = tuple(Fault(**fault) for fault in plan)
    hub = Hub({arguments.token: Account(arguments.user)})
    server = HubServer(hub, port=arguments.port, faults=faults)
    print(f"HF_ENDPOINT={server.endpoint}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
