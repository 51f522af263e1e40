"""The model without its weights: modules, schemes, and what a decoder layer is called with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationMetadata,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.engine.schemes import quantization_config
from quantize.engine.source import Source, Tensors
from quantize.protocol import WorkerError

DTYPE = torch.bfloat16
LAYERS = "model.layers"

# Persistent in old checkpoints, computed from the config today.
COMPUTED = ("rotary_emb.inv_freq",)

Calls = list[dict[str, Any]]
"""The keyword arguments of every decoder layer for one shape of input, in the layers' order."""


class _Stop(Exception):
    """Ends the model's forward before its first decoder layer."""


class Skeleton:
    """A causal language model on the meta device whose decoder layers are filled one at a time."""

    def __init__(self, folder: Path, body: dict[str, Any], device: torch.device) -> None:
        self.device = device
        with init_empty_weights(include_buffers=False):
            loaded = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self.model = AutoModelForCausalLM.from_config(
                loaded, dtype=DTYPE, trust_remote_code=False
            )
            _linearize_experts(self.model)
        self.model.eval().requires_grad_(False)
        self.layers = self.model.get_submodule(LAYERS)
        # Buffers are small and real: rotary frequencies, embedding scales.
        for buffer_owner in self.model.modules():
            for name, buffer in list(buffer_owner.named_buffers(recurse=False)):
                buffer_owner.register_buffer(name, buffer.to(device), persistent=False)
        with torch.device("meta"):
            config = quantization_config(body, self.model)
            apply_quantization_config(self.model, config, show_progress=False)
        self.schemes = self._take_schemes()

    def _take_schemes(self) -> dict[str, QuantizationScheme]:
        """Scheme by module name; the modules lose the parameters they were given with it."""
        schemes = {}
        for name, module in self.model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None:
                schemes[name] = scheme
                QuantizationMetadata.clear_quantization(module)
                vars(module).pop("forward", None)  # the wrapper that rounds weights on the fly
        return schemes

    @property
    def hidden_size(self) -> int:
        """Numbers per token between two layers."""
        return int(self.model.config.hidden_size)

    def prefix(self, layer: int) -> str:
        """What every tensor's name of this layer begins with."""
        return f"{LAYERS}.{layer}."

    def tensor_names(self, source: Source) -> tuple[list[str], list[list[str]]]:
        """Names of the tensors outside the decoder layers, and of each layer's.

        Raises SourceError where the checkpoint and the architecture do not name the same.
        """
        present = {name for name in source.names if not name.endswith(COMPUTED)}
        layers = []
        for index, layer in enumerate(self.layers):
            expected = {self.prefix(index) + name for name, _ in layer.named_parameters()}
            if missing := sorted(expected - present):
                raise WorkerError(
                    "SourceError",
                    f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing in layer "
                    f"{index} of {type(self.model).__name__})",
                )
            layers.append(sorted(expected))
        outside = present.difference(*layers)
        inside = sorted(name for name in outside if name.startswith(f"{LAYERS}."))
        if inside:
            raise WorkerError(
                "SourceError",
                f"{type(self.model).__name__} has no place for the checkpoint's tensor {inside[0]}"
                f" ({len(inside)} such tensors)",
                "set quantize.engine to llmcompressor if the checkpoint is sound",
            )
        return sorted(outside), layers

    @contextmanager
    def filled(self, index: int, tensors: Tensors) -> Iterator[torch.nn.Module]:
        """Decoder layer `index` with its weights on the device; empty again afterwards."""
        layer = self.layers[index]
        prefix = self.prefix(index)
        state = {
            name.removeprefix(prefix): tensor.to(self.device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(state, assign=True, strict=True)
        layer.requires_grad_(False)
        try:
            yield layer
        finally:
            self.layers[index] = _emptied(layer)

    @functools.lru_cache(maxsize=32)  # noqa: B019  (one skeleton lives as long as the process)
    def calls(self, batch: int, length: int) -> Calls:
        """What the model's own forward hands each decoder layer: masks, positions, rotary.

        For `batch` sequences of `length` tokens without padding. The arguments depend on the
        shape of the input alone, so zeros stand for it.
        """
        zeros = torch.zeros(batch, length, self.hidden_size, dtype=DTYPE, device=self.device)
        recorded: Calls = []

        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                raise TypeError(f"{type(self.model).__name__} calls its layers by position")
            recorded.append(kwargs)
            if len(recorded) == len(self.layers):
                raise _Stop
            return hidden

        self._run(record, inputs_embeds=zeros)
        return recorded

    def embedder(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Ids (batch, tokens) int64 → input of the first decoder layer (batch, tokens, hidden).

        `weight` is the embedding matrix. Whatever the model does behind it (Gemma multiplies) is
        in the result: it is what the model's own forward hands its first layer.
        """
        embedding = self.model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(weight.to(self.device), requires_grad=False)

        def embed(ids: torch.Tensor) -> torch.Tensor:
            taken: list[torch.Tensor] = []

            def take(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                taken.append(hidden)
                raise _Stop

            self._run(take, input_ids=ids.to(self.device))
            return taken[0]

        return embed

    def embedding_name(self) -> str:
        """The tensor that holds the embedding matrix."""
        embedding = self.model.get_input_embeddings()
        owner: str = next(n for n, m in self.model.named_modules() if m is embedding)
        return f"{owner}.weight"

    def drop_embedding(self) -> None:
        """Forget the embedding matrix again."""
        self.model.get_input_embeddings().to("meta")

    def _run(self, forward: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> None:
        """The model's forward with `forward` in the place of every decoder layer's."""
        for layer in self.layers:
            layer.forward = forward
        try:
            self.model.model(**inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            for layer in self.layers:
                del layer.forward

    def update_config(self, folder: Path) -> None:
        """Write the quantization config into the folder's `config.json`, as `oneshot` does."""
        for name, scheme in self.schemes.items():
            self.model.get_submodule(name).quantization_scheme = scheme
        compressor = ModelCompressor.from_pretrained_model(self.model)
        compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
        compressor.update_config(str(folder))


def _linearize_experts(model: torch.nn.Module) -> None:
    """Put llm-compressor's experts of single linears in the place of fused ones, without weights.

    Its own `linearize_moe` copies weights, which there are none of here.
    """
    for name, experts in get_non_linearized_moes(model):
        made = LinearExperts2D.get_linear_experts_cls(type(experts))
        model.set_submodule(name, made(getattr(experts, "config", model.config)))


def _emptied(layer: torch.nn.Module) -> torch.nn.Module:
    for module in layer.modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(module._parameters[name], device="meta"), requires_grad=False
                )
    return layer
