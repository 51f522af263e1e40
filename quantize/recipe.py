"""The recipe: frozen, strict types, one class per block of the YAML file.

:mod:`quantize.recipe_file` turns a file into a :class:`Recipe` with line numbers in its errors;
``quantize schema`` prints the JSON schema of these classes. Descriptions are written for the editor
tooltip. A lower layer never reads the file again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from quantize.block import Block, PositiveInt
from quantize.capacity.cards import find_card, known_names
from quantize.evaluation import Evaluate
from quantize.quantization import Quantize
from quantize.servers.support import row, takers, why_not
from quantize.serving import Serve
from quantize.targets import Publish

EnvironmentName = Literal[
    "llmcompressor", "autoawq", "gptqmodel", "llamacpp", "vllm", "sglang", "lmeval"
]


def _is_a_card(name: str) -> str:
    if find_card(name) is None:
        raise ValueError(f"no card {name!r} in the table: name one of {known_names()}")
    return name


Pin = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
"""A commit, or a sha256."""


class Model(Block):
    """The fine-tuned checkpoint."""

    source: str = Field(
        min_length=1,
        description="A folder (relative to the recipe file, or a shipped one) or a Hub repository.",
    )
    revision: str | None = Field(
        None, description="Hub only: a commit hash; a branch or tag is resolved and pinned."
    )
    adapter: str | None = Field(
        None, description="A LoRA adapter (folder or Hub repository) for the source."
    )
    adapter_mode: Literal["merge", "separate"] | None = Field(
        None,
        description="merge (the default): merge the adapter in BF16, then quantize. separate: "
        "quantize the source alone, and serve and measure it with the adapter beside it.",
    )
    adapter_revision: str | None = Field(None, description="Hub only: the adapter's commit hash.")
    base: str | None = Field(
        None, description="The model that was fine-tuned; cards name it, retention is against it."
    )
    base_revision: str | None = Field(None, description="Hub only: the base's commit hash.")
    trust_remote_code: Pin | None = Field(
        None,
        description="Run the Python that the checkpoint brings: of a Hub repository the commit "
        "(40 hex digits) whose code was read, of a folder the sha256 that the refusal prints.",
    )
    license: str | None = Field(
        None, description="SPDX-like Hub licence id, where the source's card does not say it."
    )

    @model_validator(mode="after")
    def _revisions_have_their_models(self) -> Model:
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision without adapter: name the adapter or remove it")
        if self.adapter_mode is not None and self.adapter is None:
            raise ValueError("adapter_mode without adapter: name the adapter or remove it")
        if self.trust_remote_code is not None and self.adapter is not None:
            raise ValueError("trust_remote_code with an adapter is not supported: merge it first")
        if self.base_revision is not None and self.base is None:
            raise ValueError("base_revision without base: name the base or remove it")
        return self

    @property
    def merges(self) -> bool:
        """Whether an adapter becomes part of the checkpoint before anything else."""
        return self.adapter is not None and self.adapter_mode != "separate"

    @property
    def keeps_adapter(self) -> bool:
        """Whether an adapter stays a thing of its own, served beside the quantized source."""
        return self.adapter is not None and self.adapter_mode == "separate"


class Calibration(Block):
    """The data that calibrated methods see."""

    source: str = Field(
        min_length=1, description="A .jsonl, .parquet or .txt file, or a Hub data set."
    )
    revision: str | None = Field(None, description="Hub only: a commit hash.")
    config: str | None = Field(None, description="Hub only: the data set's configuration.")
    split: str = Field("train", description="Hub only: the split.")
    samples: PositiveInt = Field(256, description="Sequences of token ids to calibrate on.")
    sequence_length: PositiveInt = Field(2048, description="Tokens per sequence at most.")
    packing: bool = Field(
        False, description="Join rows end to end so that every sequence is full (text rows)."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Which rows are drawn, and their order."
    )


class EnvironmentOverride(Block):
    """An environment that the user already has."""

    python: str = Field(description="Path of its Python interpreter.")


class Machine(Block):
    """Where the run is meant to go; changes no result and no key."""

    gpu: Annotated[str, AfterValidator(_is_a_card)] | None = Field(
        None, description="The GPU by its name in the table of cards, e.g. H100; found if absent."
    )
    gpus: PositiveInt | None = Field(None, description="How many of them; all here if absent.")
    price_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Of the whole machine, in one currency; costs are shown where it is set."
    )


class Recipe(Block):
    """One checkpoint, one method, one measurement, one target."""

    version: Literal[1] = Field(description="The version of this format.")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$", max_length=80)] = Field(
        description="Names the run folder and the card: lower case, digits, . _ + -"
    )
    model: Model = Field(description="The fine-tuned checkpoint.")
    calibration: Calibration | None = Field(
        None, description="The data that calibrated methods see; dynamic FP8 and rtn need none."
    )
    quantize: Quantize = Field(description="What is done to the weights.")
    evaluate: Evaluate | None = Field(
        None, description="What is measured, on both sides; nothing if absent."
    )
    serve: Serve = Field(
        default_factory=Serve, description="How the checkpoint is served and measured."
    )
    publish: Publish = Field(
        default_factory=Publish, description="Where the artifact goes; the store only if absent."
    )
    machine: Machine = Field(
        default_factory=Machine, description="Where the run is meant to go, and what that costs."
    )
    environments: dict[EnvironmentName, EnvironmentOverride] = Field(
        default_factory=dict, description="Use these interpreters instead of our own."
    )

    @property
    def calibrates(self) -> bool:
        """Whether there is a calibrate stage, whose token ids the compress stage reads."""
        return self.calibration is not None and self.quantize.reads_calibration

    @model_validator(mode="after")
    def _calibration_present(self) -> Recipe:
        calibrated = self.quantize.calibrated_part
        if calibrated is not None and self.calibration is None:
            raise ValueError(f"{calibrated} needs a calibration block")
        return self

    @model_validator(mode="after")
    def _server_takes_it(self) -> Recipe:
        made = self.quantize
        if made.effective_format == "gguf" and "engine" not in self.serve.model_fields_set:
            # llama.cpp's format: where the recipe names no server, that is the one
            served = self.serve.model_copy(update={"engine": "llamacpp"})
            object.__setattr__(self, "serve", served)
        engine = self.serve.engine
        if row(engine, made.effective_format, "cpu") is None and (
            row(engine, made.effective_format, "cuda") is None
        ):
            able = ", ".join(takers(made.effective_format, made.effective_scheme))
            why = why_not(engine, made.effective_format, made.effective_scheme, "cuda")
            raise ValueError(f"serve.engine {engine}: {why}: use serve.engine {able}")
        if engine == "sglang" and "sglang" not in self.environments:
            raise ValueError(
                "serve.engine sglang has no environment of ours: install SGLang (pip install "
                "sglang, in an environment of its own), and name its interpreter in "
                "environments: {sglang: {python: ...}}"
            )
        if engine != "vllm" and self.model.keeps_adapter:
            raise ValueError(
                f"serve.engine {engine} serves no adapter beside its base here: use vllm, or "
                "adapter_mode: merge"
            )
        return self

    @model_validator(mode="after")
    def _gguf_is_one_file(self) -> Recipe:
        if self.quantize.effective_format != "gguf":
            return self
        if self.model.keeps_adapter:
            raise ValueError(
                "model.adapter_mode: separate is not supported with format gguf: merge the adapter"
            )
        if self.model.trust_remote_code is not None:
            raise ValueError("trust_remote_code is not supported with format gguf")
        return self


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "quantize recipe, version 1"
    return schema
