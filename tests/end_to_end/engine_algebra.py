"""The streaming engine's linear algebra and files against independent oracles, in one process.

    python -m tests.end_to_end.engine_algebra REPORT [NAME ...]

Runs in the llmcompressor environment. Writes one JSON object, check → {"ok": bool, "figures":
what was measured, "failure": where it went wrong}. Importing the libraries takes longer than most
checks, hence one process for all.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.end_to_end import algebra_awq, algebra_boundaries, algebra_flow, algebra_gptq

Check = Callable[[], dict[str, Any]]

CHECKS: dict[str, Check] = {
    **algebra_gptq.CHECKS,
    **algebra_awq.CHECKS,
    **algebra_flow.CHECKS,
    **algebra_boundaries.CHECKS,
}


def run(check: Check) -> dict[str, Any]:
    """The figures, or the traceback of what did not hold."""
    try:
        return {"ok": True, "figures": check()}
    except Exception:
        return {"ok": False, "figures": {}, "failure": traceback.format_exc()}


def main() -> None:
    torch.set_grad_enabled(False)
    report, names = Path(sys.argv[1]), sys.argv[2:] or list(CHECKS)
    found = {name: run(CHECKS[name]) for name in names}
    report.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
