"""How long the streaming engine takes on a GPU at least: operations over the card's rate.

Useful floating-point operations of a layer, for T tokens in sequences of S, P numbers in the
quantized linears and hidden size d (multiply and add are two), as in bench/engine_gpu.py:

- a forward pass: 2 P T + 2 S d T. One ends before the last linear, of which P counts the largest;
  with GPTQ a second one hands the outputs on, without it the first goes on to the end; neither in
  the last layer;
- Gram matrices: t n^2 for each distinct input of n columns, of the t tokens that are taken up (all
  with GPTQ, about 8192 without);
- GPTQ: n^3 / 3 for each factorisation and R n^2 for the columns of R rows.

Experts are left out: how many tokens reach one is not known. Divided by the dense BF16 rate of the
cards: no run whose sequences are all full is faster. GPTQ's columns run in FP32 and one after
another, and layers are read from a disk, so runs take several times as long.
"""

from __future__ import annotations

from quantize.capacity.parts import Decoder
from quantize.capacity.streaming import Run

SAMPLED_TOKENS = 8192
"""As in `engine.stream`; a test compares them."""


def operations(model: Decoder, run: Run) -> float:
    """Of all layers; 0 without calibration data."""
    linears = [linear for linear in model.linears if "experts." not in linear.name]
    if not run.tokens or not linears:
        return 0.0
    sizes = [linear.elements for linear in linears]
    one_pass = 2 * (sum(sizes) + run.longest * model.hidden) * run.tokens
    last = 2 * max(sizes) * run.tokens
    taken = run.tokens if run.gptq else min(run.tokens, SAMPLED_TOKENS)
    inputs = list({linear.reads: linear.columns for linear in linears}.values())
    layer = float(one_pass - last + sum(taken * n * n for n in inputs))
    if run.gptq:
        layer += sum(linear.rows * linear.columns**2 for linear in linears)
        layer += sum(n**3 / 3 for n in inputs)
    onward = one_pass if run.gptq else last
    return model.layers * layer + (model.layers - 1) * onward


def least_seconds(model: Decoder, run: Run, bf16_tflops: float) -> float:
    """Operations / rate, a lower bound."""
    return operations(model, run) / (bf16_tflops * 1e12)
