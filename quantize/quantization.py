"""The recipe's block `quantize`: what is done to the weights, by whom, and how it is stored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

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
from quantize.engines import ENGINES, OLD_NAMES, default_engine
from quantize.schemes import (
    DATA_FREE,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCHEME,
    FIXED_GROUPS,
    FOUR_BITS,
    GROUPED,
    IMATRIX,
    EngineName,
    Format,
    Method,
    Scheme,
)


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


GroupSize = Annotated[PositiveInt | Literal["channel"], WrapValidator(_whole_or_channel)]
ModulePattern = Annotated[str, AfterValidator(_compiles)]
"""A module's full name, or 're:' and a pattern that matches from the start of the full name."""


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
    clip: bool = Field(
        False,
        description="AWQ by the streaming engine: look for the share of each group's range that "
        "rounds best, as AutoAWQ does.",
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
        if self.clip and self.method != "awq":
            raise ValueError(f"clip with method {self.method}: method awq alone clips; remove it")
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
