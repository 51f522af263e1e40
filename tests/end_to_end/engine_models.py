"""Small trained checkpoints, one for each architecture that the streaming engine is verified on.

Runs in the llmcompressor environment: `engine_models.py FOLDER [ARCHITECTURE ...] [--outliers]`.

Every model starts from the shipped base (a trained Llama of width 256): its layers are put into the
other architecture, embeddings and head are new, and all is trained for a minute, with what that
architecture has of its own: biases, norms of queries and keys, windows, offset norms, experts. So
the layers have the spectra of a trained network. They are trained no longer on purpose: in a model
that is nearly sure of most tokens the mean KL divergence hangs on few positions and few weights,
and two runs of one method, calibrated on the same sequences in another order, differ by up to 12 %.
On these it is 2 % at most, mostly below 1 %.
Weights and texts follow from fixed seeds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "tiny_llama" / "base"
SEED = 7
ROWS, LENGTH = 8, 128
"""Of a training batch; windows are shorter than LENGTH."""
STEPS, RATE = 60, 5e-3
BALANCE = 0.05
"""Weight of the loss that spreads tokens over experts."""
WINDOW = 48
EXPERTS, EXPERT_WIDTH = 8, 256

# Width, heads and layers are the base's, so that its weights fit.
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GEMMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 64,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
FAR_ROTARY = {"rope_type": "default", "rope_theta": 1000000.0}

# name → configuration class, what differs from COMMON
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"rope_parameters": {"sliding_attention": ROTARY, "full_attention": FAR_ROTARY}},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": EXPERT_WIDTH,
            "norm_topk_prob": True,
        },
    ),
}
OUTLIERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm → the linears that read it, where powers of two can be moved between them exactly."""
OFFSET_NORMS = ("gemma2", "gemma3")


def build(architecture: str, folder: Path, outliers: bool = False) -> float:
    """Make the checkpoint in `folder`; returns the loss (nats a token) of the last training steps.

    It is saved in BF16, with tokenizer, in shards of at most 3 MB, as large checkpoints are.
    """
    config_class, changes = ARCHITECTURES[architecture]
    torch.manual_seed(SEED)
    config = getattr(transformers, config_class)(**(COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _warm_start(model, architecture)
    batches = sequences("train", STEPS * ROWS, LENGTH).view(STEPS, ROWS, LENGTH)
    loss = train(model, batches, RATE)
    for parameter in model.parameters():  # not `.to()`: rotary frequencies stay FP32
        parameter.data = parameter.data.to(torch.bfloat16)
    if outliers:
        if architecture in (*OFFSET_NORMS, "qwen3_moe"):
            raise ValueError(f"{architecture} has no norm whose channels can be scaled exactly")
        put_outliers(model)
    save(model, folder)
    return loss


def save(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Write a BF16 checkpoint with the base's tokenizer."""
    model.config.dtype = torch.bfloat16
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    model.save_pretrained(folder, max_shard_size="3MB")
    for pattern in ("tokenizer*", "special_tokens_map.json"):
        for path in BASE.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def texts(split: str, seed: int) -> Iterator[str]:
    """Documents of one split of the shipped world without end; no two splits share one."""
    sys.path.insert(0, str(BASE.parent))
    try:
        from documents import documents
        from world import build_world
    finally:
        sys.path.pop(0)
    for _, text in documents(build_world(), split, seed):
        yield text


def sequences(split: str, count: int, length: int, seed: int = SEED) -> torch.Tensor:
    """Token ids (count, length) int64: documents one after another, each after `<s>`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    stream: list[int] = []
    source = texts(split, seed)
    while len(stream) < count * length:
        for ids in tokenizer(list(islice(source, 64)))["input_ids"]:
            stream += ids
    return torch.tensor(stream[: count * length]).view(count, length)


def write_tokens(path: Path, count: int, length: int, seed: int = SEED) -> None:
    """A calibrate stage's `tokens.npz`: `count` sequences of the calibration split.

    The last quarter is shorter, so that lengths differ as they do in real calibration sets.
    """
    rows = sequences("calibration", count, length, seed).tolist()
    rows = [row if i < count * 3 // 4 else row[: length // 2 + i] for i, row in enumerate(rows)]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    np.savez(path, ids=np.concatenate(rows).astype(np.int32), offsets=offsets)


@torch.no_grad()
def _warm_start(model: nn.Module, architecture: str) -> None:
    """The base's layers under this architecture's names; all else stays as initialised."""
    source = {name: value.float() for name, value in load_file(BASE / "model.safetensors").items()}
    _without_outliers(source)
    if architecture in OFFSET_NORMS:
        _to_gemma(source)
    if architecture == "qwen3_moe":
        _to_experts(source)
    target = dict(model.named_parameters())
    del source["model.embed_tokens.weight"], source["lm_head.weight"]
    for name, value in source.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            value = _repeat_heads(value, model.config.num_key_value_heads)
        if name in target:
            target[name].copy_(value)
    for name, value in target.items():
        if name.endswith("_proj.bias"):
            value.normal_(std=0.1)


def _repeat_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As many key or value heads, each one of the base's twice or more: (heads * size, in)."""
    head = weight.view(COMMON["num_key_value_heads"], COMMON["head_dim"], -1)
    return head.repeat_interleave(heads // len(head), dim=0).flatten(0, 1)


def _without_outliers(source: dict[str, torch.Tensor]) -> None:
    """Take the base's outlier channels back: powers of two, so the function stays the same."""
    for name in [n for n in source if n.endswith("layernorm.weight")]:
        layer, norm = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        weight = source[name]
        factors = 2.0 ** (weight.abs() / weight.abs().median()).log2().round()
        source[name] = weight / factors
        for reader in OUTLIERS[norm]:
            source[f"{layer}.{reader}.weight"] *= factors
    for name in [n for n in source if n.endswith("up_proj.weight")]:
        down = name.replace("up_proj", "down_proj")
        factors = 2.0 ** (source[name].norm(dim=1) / source[down].norm(dim=0)).log2().div(2).round()
        source[name] /= factors[:, None]
        source[down] *= factors


def _to_gemma(source: dict[str, torch.Tensor]) -> None:
    """Norm weights less one, the second norm's other name."""
    for name in [n for n in source if "norm" in n]:
        source[name] = source[name] - 1
        if "post_attention_layernorm" in name:
            other = name.replace("post_attention", "pre_feedforward")
            source[other] = source.pop(name)


def _to_experts(source: dict[str, torch.Tensor]) -> None:
    """Each expert takes other channels of the dense MLP, all of which are taken by some."""
    random = torch.Generator().manual_seed(SEED)
    for layer in range(COMMON["num_hidden_layers"]):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (source.pop(f"{mlp}.{p}_proj.weight") for p in ("gate", "up", "down"))
        orders = [torch.randperm(len(gate), generator=random) for _ in range(3)]
        chosen = torch.cat(orders)[: EXPERTS * EXPERT_WIDTH].view(EXPERTS, EXPERT_WIDTH)
        source[f"{mlp}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([gate[c], up[c]]) for c in chosen]
        )
        # two experts, weighted to one, have two thirds of the channels
        down = down * len(gate) / EXPERT_WIDTH
        source[f"{mlp}.experts.down_proj"] = torch.stack([down[:, c] for c in chosen])


def train(model: nn.Module, batches: torch.Tensor, rate: float) -> float:
    """AdamW, warm-up, linear decay; the mean of the last ten losses, nats a token.

    :param batches: token ids (steps, rows, tokens)
    """
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    # Experts see another number of tokens each time, for which BF16 kernels are made anew; and they
    # are kept in balance, or some would never see any.
    experts = hasattr(model.config, "num_experts")
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()  # emulated, it is slower than float32
    asked = {"use_cache": False} | ({"output_router_logits": True} if experts else {})
    model.train()
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5, 1.2 * (steps - step) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16 and not experts):
            output = model(input_ids=batch, **asked)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        if experts:
            loss = loss + BALANCE * sum(_imbalance(logits) for logits in output.router_logits)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def _imbalance(logits: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's loss (arXiv:2101.03961, 4) of one router, logits (tokens, experts).

    transformers takes it of all layers together, and so leaves experts of single layers unused.
    """
    shares = logits.softmax(-1)
    chosen = nn.functional.one_hot(shares.topk(2).indices, EXPERTS).sum(1).float()
    return EXPERTS * (chosen.mean(0) * shares.mean(0)).sum()


@torch.no_grad()
def put_outliers(model: nn.Module) -> None:
    """Multiply twelve channels of each norm by 8 to 64 and divide the columns that read them.

    For models like Llama. The channels are those with the largest effect, as in large models.
    Powers of two are exact in BF16, so the model computes the same.
    """
    random = torch.Generator().manual_seed(SEED)
    for layer in model.model.layers:  # type: ignore[union-attr]
        for norm_name, names in OUTLIERS.items():
            norm = layer.get_submodule(norm_name)
            readers = [layer.get_submodule(name) for name in names]
            columns = torch.cat([reader.weight.float() for reader in readers])
            effect = norm.weight.float().abs() * columns.norm(dim=0)
            factors = torch.ones_like(effect)
            drawn = torch.randint(3, 7, (12,), generator=random)
            factors[effect.topk(12).indices] = 2.0**drawn
            norm.weight.mul_(factors)
            for reader in readers:
                reader.weight.div_(factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--outliers", action="store_true")
    options = parser.parse_args()
    for architecture in options.architectures:
        outliers = options.outliers and architecture not in (*OFFSET_NORMS, "qwen3_moe")
        loss = build(architecture, options.folder / architecture, outliers)
        print(f"{architecture}: loss {loss:.3f} nats a token", flush=True)


if __name__ == "__main__":
    main()
