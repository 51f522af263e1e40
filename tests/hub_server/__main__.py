"""Run the server by hand: ``python -m tests.hub_server --port 8088 --token hf_test``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from tests.hub_server import Account, Hub, HubServer, Limits, PlanError, load_plan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8088)
    parser.add_argument("--token", default="hf_test", help="the one token that may write")
    parser.add_argument("--user", default="tester", help="the namespace of that token")
    parser.add_argument("--multipart-bytes", type=int, default=Limits.multipart_bytes)
    parser.add_argument(
        "--faults", type=Path, help='JSON: [{"pattern": "POST .*/commit/", "drop": "after"}, ...]'
    )
    arguments = parser.parse_args()
    try:
        faults = load_plan(arguments.faults) if arguments.faults else ()
        limits = Limits(multipart_bytes=arguments.multipart_bytes)
        hub = Hub({arguments.token: Account(arguments.user)}, limits)
        server = HubServer(hub, port=arguments.port, faults=faults)
    except PlanError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: port {arguments.port}: {error.strerror}; choose another with --port")
    print(f"A Hub for {arguments.user}/..., in memory until Ctrl-C. In another terminal:\n")
    print(f"export HF_ENDPOINT={server.endpoint} HF_TOKEN={arguments.token}", flush=True)
    for fault in faults:
        print(f"planned: {fault.pattern}")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
