"""Memory to serve, against figures that are known: Llama 3 8B and 70B, and what has no formula."""

import pytest

from quantize.capacity import (
    ALLOWANCE_BYTES,
    FP8_BYTES,
    GPUS,
    attention,
    cache_tokens,
    kv_bytes_per_token,
)

LLAMA_3_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_3_70B = LLAMA_3_8B | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize(("config", "kib"), [(LLAMA_3_8B, 128), (LLAMA_3_70B, 320)])
def test_llama_3(config, kib):
    shape = attention(config)
    assert kv_bytes_per_token(shape) == kib * 1024
    assert kv_bytes_per_token(shape, FP8_BYTES) == kib * 512


def test_what_a_config_leaves_out():
    without = {key: LLAMA_3_8B[key] for key in LLAMA_3_8B if key != "num_key_value_heads"}
    assert attention(without) == {"layers": 32, "kv_heads": 32, "head_size": 128}
    assert attention(LLAMA_3_8B | {"head_dim": 96})["head_size"] == 96
    types = ["linear_attention", "full_attention"] * 8
    assert attention(LLAMA_3_8B | {"layer_types": types})["layers"] == 8


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LLAMA_3_8B | {"kv_lora_rank": 512}, "MLA"),
        (LLAMA_3_8B | {"attn_layer_period": 8}, "hybrid"),
        ({"hidden_size": 64}, "does not state layers, kv_heads, head_size"),
        (LLAMA_3_8B | {"num_hidden_layers": True}, "does not state layers"),
    ],
)
def test_what_the_formula_does_not_hold_for(config, why):
    assert why in attention(config)


def test_tokens_are_what_is_left_on_the_gpu():
    per_token = kv_bytes_per_token(attention(LLAMA_3_8B))
    left = 80e9 * 0.9 - 16e9 - ALLOWANCE_BYTES
    assert cache_tokens(80 * 10**9, 0.9, 16 * 10**9, per_token) == left // per_token == 411987
    assert cache_tokens(24 * 10**9, 0.9, 141 * 10**9, per_token) == 0


def test_the_table_of_gpus_is_sound():
    assert [gpu.gigabytes for gpu in GPUS] == sorted(gpu.gigabytes for gpu in GPUS)
    assert all(gpu.source.startswith("https://") for gpu in GPUS)


def test_layer_types_that_are_none() -> None:
    assert "does not state layers" in attention(
        {**LLAMA_3_8B, "layer_types": [["full_attention"], {}]}
    )
