"""The recipe's block `serve`: which server, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantize.block import Block, Fraction, PositiveInt

ServerName = Literal["vllm", "llamacpp", "url", "sglang", "tgi", "ollama"]

SPLITS = frozenset({"vllm", "sglang", "tgi"})
"""Servers that cut each weight over several GPUs."""


class Endpoint(Block):
    """An OpenAI-compatible endpoint that is already up."""

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")] = Field(
        description="Where it listens, with or without /v1; no user name and no password in it."
    )
    model: str = Field(min_length=1, description="The model's name, as its /v1/models lists it.")
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None, description="The environment variable that holds the key; none is sent if absent."
    )

    @property
    def base_url(self) -> str:
        """Without /v1, which every request has."""
        return self.url.rstrip("/").removesuffix("/v1")


class Endpoints(Block):
    """The two that are compared. measure-repeat asks the baseline's again."""

    baseline: Endpoint = Field(description="Serves the model as it was.")
    candidate: Endpoint = Field(description="Serves what this recipe makes of it.")


class Serve(Block):
    """How the checkpoint is served, for the measurement and on the card."""

    engine: ServerName = Field(
        "vllm",
        description="The server; llamacpp for format gguf. url asks endpoints that are already up; "
        "sglang, tgi and ollama were checked against their documentation only.",
    )
    endpoints: Endpoints | None = Field(
        None, description="Engine url only: where baseline and candidate are served."
    )
    max_model_len: PositiveInt | None = Field(
        None, description="Context length; the checkpoint's own if absent."
    )
    gpu_memory_utilization: Fraction = Field(0.90, description="Share of the GPU that vLLM takes.")
    kv_cache_gib: PositiveInt = Field(1, description="CPU only: GiB for the KV cache.")
    enable_prefix_caching: bool = Field(True, description="Share KV blocks of equal prefixes.")
    max_num_seqs: PositiveInt = Field(64, description="Sequences decoded together at most.")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs the measurement runs on.")
    tensor_parallel_sizes: tuple[PositiveInt, ...] = Field(
        (), description="Every size that users will serve with; checked for divisibility."
    )
    extra_args: tuple[str, ...] = Field((), description="More flags of the server, as typed.")

    @model_validator(mode="after")
    def _endpoints_belong_to_url(self) -> Serve:
        if self.engine == "url" and self.endpoints is None:
            raise ValueError(
                "engine url starts no server: name those that are up in "
                "endpoints: {baseline: {url: ..., model: ...}, candidate: {url: ..., model: ...}}"
            )
        if self.engine != "url" and self.endpoints is not None:
            raise ValueError(f"endpoints with engine {self.engine}: set engine to url")
        if self.engine not in SPLITS and self.tensor_parallel_size > 1:
            raise ValueError(
                f"engine {self.engine} has no tensor_parallel_size: set it to 1, or remove it"
            )
        return self

    @property
    def secret_variables(self) -> frozenset[str]:
        """Names of the environment variables that hold secrets of this block."""
        ends = (self.endpoints.baseline, self.endpoints.candidate) if self.endpoints else ()
        return frozenset(end.api_key_variable for end in ends if end.api_key_variable is not None)
