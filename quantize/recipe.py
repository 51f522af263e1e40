"""The recipe: frozen, strict types, one class per block of the YAML file.

:mod:`quantize.recipe_file` turns a file into a :class:`Recipe` with line numbers in its errors;
``quantize schema`` prints the JSON schema of these classes. Descriptions are written for the editor
tooltip. A lower layer never reads the file again.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from quantize.artifact_formats import FORMATS
from quantize.block import Block, Fraction, PositiveInt
from quantize.capacity.cards import find_card, known_names
from quantize.engines import ENGINES, OLD_NAMES, default_engine
from quantize.evaluation import Evaluate
from quantize.servers.support import row, takers, why_not
from quantize.targets import Publish

Method = Literal["awq", "gptq", "awq+gptq", "rtn", "fp8", "int8", "autoround", "gguf"]
EngineName = Literal[
    "stream",
    "llmcompressor",
    "autoawq",
    "gptqmodel",
    "llamacpp",
    "elsewhere",
    "auto-gptq",
    "autogptq",
]
"""The last two are old names of gptqmodel."""
EnvironmentName = Literal[
    "llmcompressor", "autoawq", "gptqmodel", "llamacpp", "vllm", "sglang", "lmeval"
]
ServerName = Literal["vllm", "llamacpp", "url", "sglang", "tgi", "ollama"]
Format = Literal["compressed-tensors", "awq", "gptq", "gguf"]
Scheme = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "Q2_K",
    "Q3_K_M",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "IQ4_XS",
    "IQ4_NL",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
]

DEFAULT_SCHEME: dict[str, str] = {
    "awq": "W4A16_ASYM",
    "gptq": "W4A16",
    "awq+gptq": "W4A16_ASYM",
    "rtn": "W4A16",
    "fp8": "FP8_DYNAMIC",
    "int8": "W8A8",
    "autoround": "W4A16",
    "gguf": "Q4_K_M",
}
SCHEMES: dict[str, tuple[str, ...]] = {
    method: schemes
    for engine in reversed(ENGINES.values())  # the first engine that has a method says the most
    for method, schemes in engine.METHODS.items()
}
"""Which schemes a method can produce, best first, whatever the engine."""

MADE_HERE = tuple(m for m in get_args(Method) if default_engine(m) != "elsewhere")
"""Methods that an engine here has; others are those of artifacts that were quantized elsewhere."""

GROUPED = frozenset({"W4A16", "W4A16_ASYM", "W8A16"})
"""Schemes whose scales are per group of input channels, of a size that the recipe may choose."""

FOUR_BITS = ("W4", "Q2", "Q3", "Q4", "Q5", "IQ4")
"""What the names of schemes of about four bits begin with; Q5 loses more than 8 bits do, too."""

DEFAULT_GROUP_SIZE = 128

FIXED_GROUPS = {"NVFP4A16": 16, "MXFP4A16": 32}
"""Schemes whose groups of input channels have the size that the number format prescribes."""

IMATRIX = frozenset(
    {"Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL", "Q5_K_S", "Q5_K_M", "Q6_K", "Q4_0"}
)
"""GGUF types that read an importance matrix where there is one; they can do without."""

DATA_FREE = (
    frozenset({("rtn", s) for s in SCHEMES["rtn"]})
    | {("gguf", s) for s in SCHEMES["gguf"]}
    | {("fp8", "FP8_DYNAMIC"), ("fp8", "FP8_BLOCK")}
)
"""(method, scheme) pairs that need no calibration data."""


def _whole_or_channel(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One sentence instead of one for each type that the value is not."""
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("expected a whole number above 0, or channel") from error


def _compiles(entry: str) -> str:
    try:
        re.compile(entry[3:] if entry.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from error
    return entry


def _is_a_card(name: str) -> str:
    if find_card(name) is None:
        raise ValueError(f"no card {name!r} in the table: name one of {known_names()}")
    return name


SPLITS = frozenset({"vllm", "sglang", "tgi"})
"""Servers that cut each weight over several GPUs."""

GroupSize = Annotated[PositiveInt | Literal["channel"], WrapValidator(_whole_or_channel)]
ModulePattern = Annotated[str, AfterValidator(_compiles)]
"""A module's full name, or 're:' and a pattern that matches from the start of the full name."""


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


class Override(Block):
    """Modules that get another number format than the rest."""

    modules: tuple[ModulePattern, ...] = Field(
        description="At least one: names, or 're:' and a pattern, as in ignore."
    )
    scheme: Scheme = Field(description="Number formats of these modules.")
    group_size: GroupSize | None = Field(
        None, description="As the block's own group_size, for these modules."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Override:
        if not self.modules:
            raise ValueError("modules is empty: name at least one, or remove the override")
        _refuse_group_size(self.scheme, self.group_size)
        return self


class Quantize(Block):
    """What is done to the weights."""

    method: Method = Field(
        None,  # type: ignore[arg-type]  # filled in below, and never None after that
        description="awq, gptq, awq+gptq, rtn (round to nearest), fp8, int8 or gguf; "
        "autoround of an artifact alone.",
    )
    scheme: Scheme | None = Field(None, description="Number formats; the method's best if absent.")
    group_size: GroupSize | None = Field(
        None,
        description="Input channels that share a scale, for integer weights of 4 bits and W8A16 "
        "(default 128); channel for one scale an output channel.",
    )
    ignore: tuple[ModulePattern, ...] = Field(
        ("lm_head",), description="Modules left in BF16: names, or 're:' and a pattern."
    )
    overrides: tuple[Override, ...] = Field(
        (), description="Other schemes for some modules; the first that names a module holds."
    )
    kv_cache: Literal["fp8"] | None = Field(
        None, description="fp8: calibrate static scales, so that servers may keep the cache in FP8."
    )
    engine: EngineName = Field(
        None,  # type: ignore[arg-type]  # likewise
        description="Who quantizes: stream holds one layer in memory and resumes, and leaves "
        "architectures that it does not know to llmcompressor. Methods that only one engine has "
        "need no name. auto-gptq is the old name of gptqmodel. elsewhere goes with artifact.",
    )
    format: Format | None = Field(
        None,
        description="How the artifact is stored; the engine's own format if absent. awq and gptq "
        "are repacked from other engines' results without quantizing again.",
    )
    artifact: str | None = Field(
        None,
        min_length=1,
        description="A checkpoint that was quantized elsewhere (folder or Hub repository): it is "
        "measured and described, not made again. The other keys say what it is; quantize measure "
        "fills them in.",
    )
    artifact_revision: str | None = Field(None, description="Hub only: the artifact's commit hash.")
    dampening: Fraction = Field(
        0.01, description="GPTQ: share of the mean Hessian diagonal that is added to it."
    )
    activation_order: Literal["static", "weight", "none"] = Field(
        "static", description="GPTQ: the order in which columns are quantized."
    )
    _old_engine_name: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _fill_in(self) -> Quantize:
        """The method that format gguf implies, and the engine that the method implies."""
        # Set past the frozen model: a validator before the fields would turn JSON into Python
        # values, and lists are no tuples there.
        if self.method is None:
            if self.format != "gguf":
                raise ValueError("method is missing: name awq, gptq, fp8, ...")
            object.__setattr__(self, "method", "gguf")
        if self.engine in OLD_NAMES:
            self._old_engine_name = self.engine
            object.__setattr__(self, "engine", OLD_NAMES[self.engine])
        if self.engine is None:
            engine = "elsewhere" if self.artifact else default_engine(self.method)
            if engine == "elsewhere" and self.artifact is None:
                raise ValueError(
                    f"no engine makes method {self.method}: it is for artifacts that were "
                    "quantized elsewhere (quantize measure)"
                )
            object.__setattr__(self, "engine", engine)
        if (self.engine == "elsewhere") != (self.artifact is not None):
            raise ValueError(
                "engine elsewhere and artifact go together: remove one, or name the other"
            )
        if self.artifact_revision is not None and self.artifact is None:
            raise ValueError("artifact_revision without artifact: name it or remove the revision")
        return self

    @model_validator(mode="after")
    def _scheme_fits_method(self) -> Quantize:
        engine = ENGINES[self.engine]
        if self.method not in engine.METHODS:
            others = (name for name, one in ENGINES.items() if self.method in one.METHODS)
            able = ", ".join(name for name in others if name != "elsewhere")
            raise ValueError(
                f"engine {self.engine} has no method {self.method} (it has "
                f"{', '.join(engine.METHODS)}): use engine {able}"
            )
        allowed = engine.METHODS[self.method]
        if self.effective_scheme not in allowed:
            by = "" if self.engine in ("stream", "llmcompressor") else f" of engine {self.engine}"
            raise ValueError(
                f"method {self.method}{by} cannot produce {self.effective_scheme}: "
                f"use {', '.join(allowed)}"
            )
        _refuse_group_size(self.effective_scheme, self.group_size)
        if (part := engine.cannot_do(self)) is not None:
            raise ValueError(f"engine {self.engine} cannot do {part}: remove it, or use stream")
        if (self.effective_format == "gguf") != (self.engine == "llamacpp"):
            raise ValueError(
                f"engine {self.engine} cannot make format {self.effective_format}: GGUF is written "
                "by engine llamacpp, and by it alone"
            )
        stored = FORMATS.get(self.effective_format)
        if stored is not None and (part := stored.cannot_hold(self)) is not None:
            raise ValueError(f"format {self.effective_format} cannot hold {part}")
        return self

    @property
    def notices(self) -> tuple[str, ...]:
        """What is accepted, but better written in another way."""
        if self._old_engine_name is None:
            return ()
        return (
            f"quantize.engine: {self._old_engine_name} is the old name of GPTQModel's engine; "
            f"write {self.engine}",
        )

    @property
    def effective_scheme(self) -> str:
        """The scheme, with the method's default filled in."""
        return self.scheme or DEFAULT_SCHEME[self.method]

    @property
    def effective_format(self) -> str:
        """How the artifact is stored, with the engine's own format filled in."""
        return self.format or ENGINES[self.engine].FORMAT

    @property
    def repacks(self) -> bool:
        """Whether the engine's result is stored in another format than the engine writes."""
        return self.artifact is None and self.effective_format != ENGINES[self.engine].FORMAT

    @property
    def effective_group_size(self) -> int | Literal["channel"] | None:
        """Input channels per scale; None where the scheme itself says what shares a scale."""
        return _filled_in(self.effective_scheme, self.group_size)

    @property
    def effective_overrides(self) -> list[dict[str, Any]]:
        """`modules` (list), `scheme` and `group_size` (as above) of each override, in order."""
        return [
            {
                "modules": list(override.modules),
                "scheme": override.scheme,
                "group_size": _filled_in(override.scheme, override.group_size),
            }
            for override in self.overrides
        ]

    @property
    def weight_bits(self) -> Literal[4, 8]:
        """4 if any module gets weights of four bits, else 8: what the default margins go by."""
        schemes = [self.effective_scheme, *(override.scheme for override in self.overrides)]
        return (
            4 if any(scheme.startswith(FOUR_BITS) or "FP4" in scheme for scheme in schemes) else 8
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether the compress stage cannot do without token ids."""
        return self.calibrated_part is not None

    @property
    def reads_calibration(self) -> bool:
        """Whether the compress stage reads token ids where the recipe has a calibration block."""
        return self.needs_calibration or self.effective_scheme in IMATRIX

    @property
    def calibrated_part(self) -> str | None:
        """What reads token ids, in words; None if nothing does."""
        if self.artifact is not None:
            return None  # it was calibrated elsewhere, if at all
        if (self.method, self.effective_scheme) not in DATA_FREE:
            return f"method {self.method} with {self.effective_scheme}"
        if any(override.scheme == "FP8" for override in self.overrides):
            return "an override with FP8 (static activation scales)"
        return "kv_cache" if self.kv_cache is not None else None


def _refuse_group_size(scheme: str, group_size: int | str | None) -> None:
    if group_size is not None and scheme not in GROUPED:
        fixed = FIXED_GROUPS.get(scheme)
        why = f"has groups of {fixed}, always" if fixed else "has no groups"
        raise ValueError(f"scheme {scheme} {why}: remove group_size")


def _filled_in(
    scheme: str, group_size: int | Literal["channel"] | None
) -> int | Literal["channel"] | None:
    return (group_size or DEFAULT_GROUP_SIZE) if scheme in GROUPED else None


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
