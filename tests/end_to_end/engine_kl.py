"""How far quantized checkpoints are from their baseline, in transformers, on held-out text.

Runs in the llmcompressor environment: `engine_kl.py BASELINE CANDIDATE ...` prints JSON.

A compressed-tensors checkpoint is decompressed when it is loaded, and its forward quantizes
activations where its scheme says so (FP8, INT8 W8A8): `Measured.activations` says whether it did.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

if __package__:
    from tests.end_to_end.engine_models import sequences
else:
    from engine_models import sequences

PROMPTS = 4
PROMPT_TOKENS, NEW_TOKENS = 24, 32


@dataclass(frozen=True)
class Measured:
    """One checkpoint against its baseline."""

    kl: float
    """Mean over positions of KL(baseline || candidate), nats, over the whole vocabulary."""
    kl_standard_error: float
    """Of `kl`, between sequences: they are independent texts, positions are not."""
    perplexity: float
    """exp of the mean negative log-likelihood of every token but each sequence's first."""
    tokens: int
    greedy: list[list[int]]
    """Continuations of PROMPTS held-out beginnings, NEW_TOKENS tokens each, without cache."""
    activations: int
    """Modules whose inputs are quantized in the forward."""


@dataclass(frozen=True)
class Baseline:
    """What candidates are compared to: BF16 logits (sequences, positions, vocabulary)."""

    ids: torch.Tensor
    logits: torch.Tensor
    measured: Measured

    def first(self, count: int) -> Baseline:
        """The same with fewer sequences."""
        return Baseline(self.ids[:count], self.logits[:count], self.measured)


def load(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint in BF16, decompressed, ready to run.

    transformers 5 stacks the experts of a mixture into one tensor, whose inputs are not quantized
    and whose zero points are not read. Such a checkpoint is loaded with an expert a linear, so that
    the forward is the one that the checkpoint describes.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "num_experts"):
        return _load_experts(folder, config).eval()
    return load_stacked(folder).eval()


def load_stacked(folder: Path) -> transformers.PreTrainedModel:
    """As users of transformers load it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    )


def _load_experts(folder: Path, config: Any) -> transformers.PreTrainedModel:
    quantized = config.__dict__.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linearize_moe(model)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    if quantized is None:
        model.load_state_dict(tensors)
        return model
    compressor = ModelCompressor.from_compression_config(CompressedTensorsConfig(**quantized))
    apply_quantization_config(model, compressor.quantization_config, run_compressed=False)
    compressor.compress_model(model)
    model.load_state_dict(tensors)
    compressor.decompress_model(model)
    return model


@torch.no_grad()
def baseline(folder: Path, ids: torch.Tensor) -> Baseline:
    """Logits of held-out sequences, `ids` (sequences, tokens)."""
    model = load(folder)
    logits = _logits(model, ids)
    measured = Measured(
        kl=0.0,
        kl_standard_error=0.0,
        perplexity=_perplexity(logits, ids),
        tokens=ids.numel(),
        greedy=_greedy(model, ids),
        activations=0,
    )
    return Baseline(ids, logits, measured)


@torch.no_grad()
def measure(folder: Path, against: Baseline) -> Measured:
    """Load the candidate and compare it with the baseline at every position."""
    model = load(folder)
    logits = _logits(model, against.ids)
    each = []
    for ours, theirs in zip(against.logits, logits, strict=True):  # (positions, vocabulary)
        p, q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        each.append((p.exp() * (p - q)).sum(-1).double().mean())
    means = torch.stack(each)
    return Measured(
        kl=float(means.mean()),
        kl_standard_error=float(means.std() / math.sqrt(len(means))),
        perplexity=_perplexity(logits, against.ids),
        tokens=against.ids.numel(),
        greedy=_greedy(model, against.ids),
        activations=sum(
            getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
            is not None
            for module in model.modules()
        ),
    )


def _logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(sequences, positions, vocabulary) as the BF16 forward gives them."""
    batches = [model(input_ids=batch, use_cache=False).logits for batch in ids.split(8)]
    return torch.cat([batch.to(torch.bfloat16) for batch in batches])


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), tokens[1:]).double()
        for row, tokens in zip(logits, ids, strict=True)
    ]
    return math.exp(float(torch.stack(losses).mean()))


def _greedy(model: transformers.PreTrainedModel, ids: torch.Tensor) -> list[list[int]]:
    tokens = ids[:PROMPTS, :PROMPT_TOKENS]
    for _ in range(NEW_TOKENS):
        chosen = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    continuations: list[list[int]] = tokens[:, PROMPT_TOKENS:].tolist()
    return continuations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    ids = sequences("held_out", options.sequences, options.length)
    against = baseline(options.baseline, ids)
    found = {str(folder): asdict(measure(folder, against)) for folder in options.candidates}
    print(json.dumps({str(options.baseline): asdict(against.measured)} | found))


if __name__ == "__main__":
    main()
