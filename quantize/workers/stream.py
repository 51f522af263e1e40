"""The streaming engine on the calibrate stage's token ids.

Runs in the llmcompressor environment; with several GPUs it starts itself again under torchrun, one
process a GPU. The request body is that of `workers.oneshot` and, where it is asked for, `clip`;
beside the `output` folder it writes `sensitivity.json` where there was calibration data.
Result body: `quantized` (module names), `unvisited` and `not_factorised` (those that were rounded
to nearest because no token reached them, or because their Gram matrix has no Cholesky factor),
`layers` (seconds of each; with `clip`, of each linear the share of its groups whose range was
narrowed, and the loss before and after), `seconds`, `peak_memory_bytes`, `versions`;
`peak_device_bytes` on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from quantize.engine.memory import peaks, return_freed_memory

return_freed_memory()

import torch  # noqa: E402  (the allocator is set before the first tensor)

from quantize.engine.ranks import join, leave  # noqa: E402
from quantize.engine.stream import PACKAGES, stream  # noqa: E402
from quantize.protocol import Events, Request, load_request, worker_main  # noqa: E402

SAY_SECONDS = 0.25
PR_SET_PDEATHSIG = 1


def run(request: Request, events: Events) -> dict[str, Any]:
    """Quantize; what `request.work` holds of an interrupted run is not done again."""
    started = time.monotonic()
    said = [0.0]
    ranks = join()

    def say(done: float, layers: int) -> None:
        if ranks.first and (done == layers or time.monotonic() - said[0] >= SAY_SECONDS):
            said[0] = time.monotonic()
            events.progress("quantizing", round(done, 2), layers, "layers")

    result = stream(request.body, Path(request.work) / "stream", ranks, say)
    leave()
    return {
        "quantized": result.quantized,
        "unvisited": result.unvisited,
        "not_factorised": result.not_factorised,
        "layers": result.layers,
        "seconds": time.monotonic() - started,
        **peaks(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    """The worker; under torchrun, only rank 0 writes the result."""
    devices = torch.cuda.device_count()
    if "RANK" not in os.environ:
        if devices > 1:
            _start_again(devices)
        worker_main(run)
    # A rank leads a session of its own, where torchrun's end would not reach it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.environ["RANK"] == "0":
        worker_main(run)
    request = load_request(sys.argv[1])
    run(request, Events(request.events))


def _start_again(devices: int) -> None:
    """Become torchrun with one process a device; ranks find the package as this process did."""
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    worker = ["-m", "quantize.workers.stream", *sys.argv[1:3]]
    os.execv(sys.executable, [sys.executable, "-P", *torchrun, *worker])


if __name__ == "__main__":
    main()
