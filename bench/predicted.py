"""What quantize.capacity expects of a random checkpoint's run, beside what was measured."""

from __future__ import annotations

from bench.random_llama import Shape
from quantize.capacity.parts import Decoder, Linear
from quantize.capacity.streaming import Run, device_peak, held_hidden_states, host_peak


def decoder(shape: Shape) -> Decoder:
    """The shapes that the formulas read."""
    linears = tuple(Linear(name, *size) for name, size in shape.linears.items())
    embedding = shape.vocabulary * shape.hidden
    return Decoder(
        hidden=shape.hidden,
        layers=shape.layers,
        linears=linears,
        layer_elements=shape.parameters + 2 * shape.hidden,
        outside_elements=2 * embedding + shape.hidden,
        embedding_elements=embedding,
    )


def peaks(
    shape: Shape, method: str, samples: int, length: int, device_bytes: int | None
) -> tuple[int, int | None]:
    """Bytes in the host's memory and, with a GPU of so many bytes, on it; streaming engine."""
    device = "cpu" if device_bytes is None else "cuda"
    tokens = 0 if method == "fp8" else samples * length
    run, model = Run(method, tokens, length, device), decoder(shape)
    host = host_peak(model, run).bytes
    if device_bytes is None:
        return host, None
    return host, device_peak(model, run).bytes + held_hidden_states(model, run, device_bytes)
