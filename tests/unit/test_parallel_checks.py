"""Packed tensors over several GPUs: the shares are those of vLLM, by arithmetic of our own here."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, recipe, write_checkpoint

from quantize.artifact_formats import FORMATS
from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.parallel_checks import cpu_kernel_findings, parallel_faults
from quantize.source_checks import chosen_weights
from quantize.tensors import TensorInfo


def checkpoint(shapes: dict[str, tuple[int, int]], **config: int) -> Checkpoint:
    """Linears of one layer by name, without files."""
    tensors = {}
    for name, shape in shapes.items():
        full = f"model.layers.0.{name}.weight"
        tensors[full] = TensorInfo(full, "BF16", shape, Path("x"), 0, 2 * shape[0] * shape[1])
    stated: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **config}
    return Checkpoint(Path("x"), stated, tensors, ())


def faults(shapes: dict[str, tuple[int, int]], size: int, quantize: dict, **config: int) -> str:
    made = checkpoint(shapes, **config)
    return "; ".join(
        parallel_faults(made, chosen_weights(made, recipe(quantize=quantize).quantize), size)
    )


ASYM = {"method": "awq", "group_size": 32}
SYM = {"method": "gptq", "group_size": 32}


def test_zero_points_of_outputs_are_packed_in_eights() -> None:
    up = {"mlp.up_proj": (24, 64)}  # zero points: 3 words of 8 outputs by 2 groups
    assert "mlp.up_proj.weight_zero_point [3, 2]: 12 outputs for each GPU" in faults(up, 2, ASYM)
    assert faults(up, 3, ASYM) == ""
    assert faults(up, 2, SYM) == ""  # there are none


def stored_faults(name: str, shapes: dict[str, tuple[int, int]], size: int, quantize: dict) -> str:
    made = checkpoint(shapes)
    chosen = chosen_weights(made, recipe(quantize=quantize).quantize)
    return "; ".join(parallel_faults(made, chosen, size, FORMATS[name]))


def test_other_formats_pack_along_other_dimensions() -> None:
    up, down = {"mlp.up_proj": (24, 64)}, {"mlp.down_proj": (64, 24)}
    found = stored_faults("awq", up, 2, ASYM)
    assert "mlp.up_proj.qweight [64, 3]: 12 outputs for each GPU" in found
    assert "along dimension 1" in found
    assert stored_faults("awq", up, 3, ASYM) == ""
    channel = {"method": "gptq", "group_size": "channel"}
    found = stored_faults("gptq", down, 2, channel)
    assert "mlp.down_proj.qweight [3, 64]: 12 inputs for each GPU" in found
    assert "scales" not in found
    assert stored_faults("awq", down, 2, channel) == ""  # an input is a row there
    assert stored_faults("gptq", {"mlp.up_proj": (24, 64)}, 2, SYM) != ""  # its zero points


def test_inputs_of_a_channel_are_packed_in_eights() -> None:
    down = {"mlp.down_proj": (64, 24)}  # 3 words of 8 inputs
    channel = {"method": "gptq", "group_size": "channel"}
    found = faults(down, 2, channel)
    assert "mlp.down_proj.weight_packed [64, 3]: 12 inputs for each GPU are no whole" in found
    assert "weight_scale" not in found  # one for each output, whole on every GPU
    assert faults(down, 3, channel) == ""
    eight_bits = {"method": "gptq", "scheme": "W8A16", "group_size": "channel"}
    assert faults(down, 2, eight_bits) == ""  # 4 inputs to a word
    assert faults({"mlp.down_proj": (64, 24)}, 4, eight_bits) != ""


def test_groups_of_inputs_stay_whole() -> None:
    down = {"mlp.down_proj": (64, 96)}
    assert "shares of 32 inputs each" in faults(down, 2, SYM)
    assert faults(down, 3, SYM) == ""


def test_key_and_value_heads_are_repeated() -> None:
    kv = {"self_attn.k_proj": (8, 64)}  # two heads of four outputs
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert "4 outputs for each GPU" in faults(kv, 2, ASYM, **heads)
    assert "4 outputs for each GPU" in faults(kv, 4, ASYM, **heads)  # each head twice
    assert faults(kv, 4, SYM, **heads) == ""
    wide = {"self_attn.k_proj": (16, 64)}
    assert faults(wide, 8, ASYM, **heads) == ""
    assert "2 key-value heads" in faults(wide, 3, ASYM, **heads | {"num_attention_heads": 9})


@pytest.mark.parametrize(
    "scheme",
    [
        {"method": "fp8"},
        {"method": "int8"},
        {"method": "rtn", "scheme": "NVFP4A16"},
        {"method": "rtn", "scheme": "MXFP4A16"},
        {"method": "awq"},
        {"method": "gptq", "group_size": "channel"},
    ],
)
def test_a_large_model_splits(scheme: dict) -> None:
    """Llama 3 of 70B, on 2, 4 and 8 GPUs."""
    shapes = {
        "self_attn.q_proj": (8192, 8192),
        "self_attn.k_proj": (1024, 8192),
        "self_attn.v_proj": (1024, 8192),
        "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (28672, 8192),
        "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672),
    }
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    for size in (2, 4, 8):
        assert faults(shapes, size, scheme, **heads) == ""


def cpu(shapes: dict[str, tuple[int, int]], quantize: dict, size: int = 1) -> str:
    made = checkpoint(shapes, num_attention_heads=4, num_key_value_heads=4)
    chosen = chosen_weights(made, recipe(quantize=quantize).quantize)
    return " | ".join(f.message for f in cpu_kernel_findings(made, chosen, size))


def test_the_cpu_kernel_takes_multiples_of_32() -> None:
    qkv = {f"self_attn.{part}_proj": (16, 64) for part in "qkv"}
    assert "self_attn.qkv with 48 outputs" in cpu(qkv, SYM)
    assert cpu(qkv | {"self_attn.q_proj": (32, 64)}, SYM) == ""  # 64 together
    assert cpu(qkv, {"method": "int8"}) == ""
    narrow = {"mlp.down_proj": (64, 48)}
    channel = {"method": "gptq", "group_size": "channel"}
    assert "mlp.down_proj with 48 inputs" in cpu(narrow, channel)


def test_the_tiny_fixture_runs_on_a_cpu(tmp_path: Path) -> None:
    made = read_checkpoint(write_checkpoint(tmp_path, llama_tensors(), llama_config()))
    chosen = chosen_weights(made, recipe().quantize)
    assert cpu_kernel_findings(made, chosen, 1) == []


@pytest.mark.parametrize("kv_heads", [0, -1])
def test_a_config_without_sense_is_no_crash(kv_heads: int) -> None:
    assert faults({"self_attn.k_proj": (64, 64)}, 2, SYM, num_key_value_heads=kv_heads) == ""


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_nothing_does_not_split(shape: tuple[int, int]) -> None:
    assert "nothing is left for a GPU" in faults({"mlp.up_proj": shape}, 2, SYM)
