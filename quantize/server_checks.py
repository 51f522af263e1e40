"""Can the recipe's server be started here, or is the endpoint that it names up?"""

from __future__ import annotations

import shutil

from quantize.environment_checks import check_loopback, check_server
from quantize.environments import Environments
from quantize.errors import ResourceError
from quantize.findings import Finding, Told
from quantize.servers import SERVERS, cannot_serve, url
from quantize.servers.support import BF16, LABELS
from quantize.serving import Endpoint, Serve


def check_serving(
    serve: Serve,
    accelerator: str,
    architecture: str | None,
    environments: Environments | None,
    *,
    online: bool,
) -> Told:
    """A port, the server's program, whether it serves anything here; or the endpoints' models."""
    if serve.endpoints is not None:
        ends = (serve.endpoints.baseline, serve.endpoints.candidate)
        return _check_endpoints(ends, serve.max_model_len, online=online)
    backend = SERVERS[serve.engine]
    told = check_loopback()
    if (why := cannot_serve(serve.engine, backend.READS, BF16, accelerator)) is not None:
        hint = "choose another serve.engine (docs/servers.md), or another machine"
        told.findings.append(
            Finding(f"the baseline is not served here: {why}", hint, ResourceError)
        )
    if backend.PROGRAM is not None and shutil.which(backend.PROGRAM) is None:
        what = f"there is no {backend.PROGRAM} here, which is {LABELS[backend.NAME]}"
        told.findings.append(Finding(what, backend.INSTALL, ResourceError))
    if backend.NAME == "vllm" and architecture is not None and environments is not None:
        told.notes += check_server(environments, architecture)
    return told


def _check_endpoints(
    ends: tuple[Endpoint, Endpoint], max_model_len: int | None, *, online: bool
) -> Told:
    """Their keys are set; online, each lists the model that the recipe names."""
    for end in ends:
        url.api_key(end)
    if not online:
        return Told(unchecked="offline: the endpoints were not asked")
    for end in dict.fromkeys(ends):
        url.connect(end, max_model_len).close()
    return Told()
