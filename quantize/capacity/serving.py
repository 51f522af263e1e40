"""What serving a checkpoint takes of GPU memory: formulas, computed and not measured.

Weights: the bytes of the safetensors files; servers keep packed weights in the size they have on
disk. KV cache: for each token and each layer with attention one key and one value for every
key-value head,

    bytes per token = layers x 2 x key-value heads x channels per head x bytes per value

(Pope et al., arXiv:2211.05102, section 2; vLLM's `FullAttentionSpec.page_size_bytes`). Layers with
a sliding window keep fewer tokens and are counted as if they kept all: an upper bound.

What is left for the cache on one GPU, by vLLM's rule for `--gpu-memory-utilization`:

    tokens = (utilization x memory - weights - ALLOWANCE_BYTES) / bytes per token, rounded down
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BF16_BYTES = 2
FP8_BYTES = 1

ALLOWANCE_BYTES = 2_000_000_000
"""Activations, the driver's context and captured graphs of one GPU. An estimate: it grows with the
model's width and with how many tokens are computed at once."""

OTHER_CACHES = {
    "kv_lora_rank": "its attention keeps latent vectors (MLA)",
    "attn_layer_period": "not every layer has attention (a hybrid)",
    "hybrid_override_pattern": "not every layer has attention (a hybrid)",
    "layers_block_type": "not every layer has attention (a hybrid)",
    "v_head_dim": "keys and values differ in size",
}
"""Keys of a config by which a KV cache has another size than the formula's, and why."""

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Entries of a config's `layer_types` that keep keys and values."""


def attention(config: Mapping[str, Any]) -> dict[str, int] | str:
    """What the KV cache depends on, from a language model's config; or why that cannot be told.

    `layers` (those that keep keys and values), `kv_heads`, `head_size`.
    """
    for key, why in OTHER_CACHES.items():
        if config.get(key) is not None:
            return why
    heads, width = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    types = config.get("layer_types")
    if isinstance(types, list):
        layers = sum(isinstance(kind, str) and kind in ATTENTION_LAYERS for kind in types)
    else:
        layers = _count(config, "num_hidden_layers")
    head_size = _count(config, "head_dim") or (width // heads if heads else 0)
    found = {
        "layers": layers,
        "kv_heads": _count(config, "num_key_value_heads") or heads,
        "head_size": head_size,
    }
    absent = [name for name, value in found.items() if not value]
    return f"its config does not state {', '.join(absent)}" if absent else found


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number above 0, or 0 where the config states none."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0


def kv_bytes_per_token(attention: Mapping[str, int], value_bytes: int = BF16_BYTES) -> int:
    """Bytes of the KV cache that one token takes, over all layers and both keys and values."""
    values = attention["layers"] * 2 * attention["kv_heads"] * attention["head_size"]
    return values * value_bytes


def cache_tokens(
    gpu_bytes: int, utilization: float, weight_bytes: int, bytes_per_token: int
) -> int:
    """Tokens of KV cache that fit on one GPU beside the weights; 0 where the weights do not fit."""
    left = utilization * gpu_bytes - weight_bytes - ALLOWANCE_BYTES
    return max(0, int(left // bytes_per_token))


PARALLEL_SIZES = (1, 2, 4, 8, 16)
"""Tensor-parallel sizes that are looked at: what one machine holds."""


def share_bytes_per_token(
    attention: Mapping[str, int], parallel: int, value_bytes: int = BF16_BYTES
) -> int:
    """What a token takes on each of `parallel` GPUs: heads are split, and at least one is kept.

    vLLM copies a key-value head where there are more GPUs than heads (`get_num_kv_heads`).
    """
    heads = max(1, -(-attention["kv_heads"] // parallel))
    return kv_bytes_per_token({**attention, "kv_heads": heads}, value_bytes)


def context_tokens(
    gpu_bytes: int,
    utilization: float,
    weight_bytes: int,
    attention: Mapping[str, int],
    parallel: int = 1,
    value_bytes: int = BF16_BYTES,
) -> int:
    """Tokens of KV cache beside the weights on `parallel` GPUs; 0 where the weights do not fit.

    Each GPU has its part of the weights (norms, kept whole, are left out of account: a 70B model
    has 2.6 MB of them) and of every token's keys and values, and its own allowance.
    """
    each = -(-weight_bytes // parallel)
    per_token = share_bytes_per_token(attention, parallel, value_bytes)
    return cache_tokens(gpu_bytes, utilization, each, per_token)


def least_gpus(
    gpu_bytes: int,
    utilization: float,
    weight_bytes: int,
    attention: Mapping[str, int],
    tokens: int,
    sizes: Iterable[int] = PARALLEL_SIZES,
    value_bytes: int = BF16_BYTES,
) -> int | None:
    """The smallest of these tensor-parallel sizes that holds the weights and so many tokens."""
    for size in sorted(sizes):
        found = context_tokens(gpu_bytes, utilization, weight_bytes, attention, size, value_bytes)
        if found >= max(1, tokens):
            return size
    return None
