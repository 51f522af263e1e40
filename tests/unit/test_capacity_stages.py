"""Every stage's needs, the cards, costs: arithmetic on Llama 3.1 70B, and what is refused."""

import json
from pathlib import Path
from typing import Any

import llama_70b
import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from llama_70b import STAGES, recipe

from quantize.capacity.cards import CARDS, FILE, GPUS, find_card
from quantize.capacity.cost import dollars, dollars_per_million_tokens
from quantize.capacity.estimate import Needs, calibration_tokens, decoder, stage_needs
from quantize.capacity.from_config import tensors_of
from quantize.capacity.parts import Decoder, Linear, Peak
from quantize.capacity.planned import Money, Planned, planned
from quantize.capacity.serving import attention, context_tokens, least_gpus, share_bytes_per_token
from quantize.capacity.streaming import (
    BATCH_TOKENS,
    CLIPPED_TOGETHER,
    Run,
    _moments,
    device_peak,
    held_hidden_states,
    host_peak,
)
from quantize.capacity.work import SAMPLED_TOKENS, least_seconds, operations
from quantize.checkpoint import read_checkpoint
from quantize.recipe import Recipe
from quantize.resources import shipped_root
from quantize.source_checks import promised_bytes

D, M, LAYERS, VOCABULARY = 8192, 28672, 80, 128256
KEYS = 1024  # 8 heads of 128
LINEARS = 2 * D * D + 2 * KEYS * D + 3 * D * M  # numbers in a layer


def needs(given: Recipe, device: str = "cuda", **keys: Any) -> dict[str, Needs]:
    found = stage_needs(llama_70b.checkpoint(), given, device, STAGES, **keys)
    return {one.stage: one for one in found}


def figures(*changes: str, money: Money | None = None) -> Planned:
    return planned(llama_70b.checkpoint(), recipe(*changes), "cpu", STAGES, money or Money(), {})


def test_the_shapes_are_those_of_the_published_checkpoint() -> None:
    checkpoint = llama_70b.checkpoint()
    assert checkpoint.parameters == 70_553_706_496  # as the Hub counts them
    assert checkpoint.parameters == LAYERS * (LINEARS + 2 * D) + 2 * VOCABULARY * D + D
    assert len(checkpoint.tensors) == 723  # as in its model.safetensors.index.json
    assert tensors_of(llama_70b.CONFIG | {"architectures": ["MysteryForCausalLM"]}) is None
    tied = llama_70b.checkpoint(tie_word_embeddings=True)
    assert tied.parameters == checkpoint.parameters - VOCABULARY * D


def test_shapes_from_a_config_are_a_real_checkpoints(tmp_path: Path) -> None:
    for tied in (False, True):
        folder = write_checkpoint(
            tmp_path / str(tied), llama_tensors(tied=tied), llama_config(tied=tied)
        )
        real = read_checkpoint(folder)
        made = tensors_of(real.config)
        assert made is not None
        assert {name: info.shape for name, info in made.items()} == {
            name: info.shape for name, info in real.tensors.items()
        }


def test_a_70b_at_4_bits_is_39_8_gb() -> None:
    """4 bits a weight, a BF16 scale and a 4-bit zero point for 128 of them; the rest in BF16."""
    size = promised_bytes(llama_70b.checkpoint(), recipe())
    groups = LAYERS * LINEARS // 128
    rest = 2 * (LAYERS * 2 * D + 2 * VOCABULARY * D + D)
    packed = LAYERS * LINEARS // 2 + 2 * groups + groups // 2 + rest
    shapes = 7 * LAYERS * 16  # two int64 of each linear
    assert packed <= size <= packed + shapes
    assert f"{size / 1e9:.1f}" == "39.8"
    shape = attention(llama_70b.CONFIG)
    assert isinstance(shape, dict)
    for card in CARDS:
        fits = context_tokens(card.bytes, 1.0, size, shape) > 0
        assert fits == (card.gigabytes >= 48), card.name  # neither 24 nor 32 nor 40 GB


def test_context_on_several_gpus() -> None:
    shape = attention(llama_70b.CONFIG)
    assert isinstance(shape, dict)
    assert share_bytes_per_token(shape, 1) == 80 * 2 * 8 * 128 * 2 == 320 << 10
    assert share_bytes_per_token(shape, 4) == 80 << 10
    assert share_bytes_per_token(shape, 16) == share_bytes_per_token(shape, 8) == 40 << 10
    size = 39_767_794_432
    left = 0.9 * 24e9 - size / 4 - 2e9
    assert context_tokens(24 * 10**9, 0.9, size, shape, 4) == left // (80 << 10) == 117_896
    assert context_tokens(24 * 10**9, 0.9, size, shape, 2) == 0
    assert least_gpus(24 * 10**9, 0.9, size, shape, 117_896) == 4
    assert least_gpus(24 * 10**9, 0.9, size, shape, 117_897) == 8
    assert least_gpus(24 * 10**9, 0.9, size, shape, 10**9) is None
    assert least_gpus(80 * 10**9, 0.9, 141_107_412_992, shape, 32768) == 4
    assert least_gpus(80 * 10**9, 0.9, 141_107_412_992, shape, 1, (3, 6)) == 3


def test_what_a_layer_of_the_70b_takes_on_a_gpu() -> None:
    model = decoder(llama_70b.checkpoint(), recipe().quantize)
    assert model.layers == 80 and model.outside_elements == 2 * VOCABULARY * D + D
    assert sum(linear.elements for linear in model.linears) == LINEARS
    assert {name: len(found) for name, found in model.units.items()} == {
        "self_attn.qkv": 3,
        "self_attn.o_proj": 1,
        "mlp.gate_up": 2,
        "mlp.down_proj": 1,
    }
    run = Run("awq+gptq", 512 * 2048, 2048, "cuda")
    peak = device_peak(model, run)
    parts = {part.what: part.bytes for part in peak.parts}
    assert parts["the layer"] == 2 * (LINEARS + 2 * D)
    assert parts["Gram matrices"] == 4 * (3 * D**2 + M**2)
    activations = 2 * 32768 * (4 * M + 8 * D) + M**2
    assert parts["activations of a batch"] == activations
    few = device_peak(model, Run("awq+gptq", 4 * 2048, 2048, "cuda"))  # matrices, not batches
    assert few.when == "GPTQ"
    assert {part.what: part.bytes for part in few.parts}["weights and factor"] == 4 * (
        D * M + 3 * M**2
    )
    assert held_hidden_states(model, run, 141 * 10**9) == 4 * 512 * 2048 * D
    assert held_hidden_states(model, run, 80 * 10**9) == 0
    assert device_peak(model, Run("fp8", 0, 0, "cuda")).when == "packing"
    assert few.certain < few.bytes < peak.bytes


def test_experts() -> None:
    """Each expert sees inputs of its own; AWQ scales what all of them read together."""
    names = [f"mlp.experts.{expert}." for expert in range(8)]
    linears = [Linear(f"{name}{part}_proj", 16, 32) for name in names for part in ("gate", "up")]
    linears += [Linear(f"{name}down_proj", 32, 16) for name in names]
    model = Decoder(32, 2, tuple(linears), 100, 0, 0)
    parts = {
        part.what: part.bytes
        for peak in _moments(model, Run("awq", 1000, 100, "cuda"))
        for part in peak.parts
    }
    assert parts["Gram matrices"] == 4 * 8 * (32**2 + 16**2)
    assert parts["a Gram matrix for each linear"] == 4 * 8 * (2 * 32**2 + 16**2)


def test_memory_does_not_grow_with_depth_but_with_the_vocabulary() -> None:
    linears = (Linear("mlp.up_proj", 1024, 512), Linear("mlp.down_proj", 512, 1024))
    run = Run("gptq", 4096, 512, "cpu")

    def peak(layers: int, outside: int, stored: int = 2) -> int:
        model = Decoder(512, layers, linears, 2**20, outside, outside, stored)
        return host_peak(model, run).bytes

    assert peak(4, 1000) == peak(80, 1000)
    assert peak(4, 10**9) - peak(4, 10**9 - 10) == 10 * (2 + 2)
    assert peak(4, 10**9, 4) == peak(4, 10**9) + 2 * 10**9  # pages of a file in FP32


def test_another_format_is_written_beside_the_first() -> None:
    given, checkpoint = recipe("quantize.format=awq"), llama_70b.checkpoint()
    (first,) = stage_needs(checkpoint, given, "cuda", [("compress", "compress")])
    assert first.disk_bytes == needs(recipe())["compress"].disk_bytes
    (second,) = stage_needs(checkpoint, given, "cuda", [("convert", "convert")])
    assert second.disk_bytes == promised_bytes(checkpoint, given, "awq")
    assert (second.device, second.gpus) == (None, 0)
    assert second.host.bytes < 10**9  # blocks of weights, whatever the checkpoint


def test_disk_of_every_stage() -> None:
    found = {stage: one.disk_bytes for stage, one in needs(recipe(), downloads=["fetch"]).items()}
    tokens, _ = calibration_tokens(recipe())
    assert tokens == 512 * 2048
    assert found["fetch"] == 141_107_412_992
    assert found["compress"] == 39_767_794_432 + 4 * tokens * D
    assert needs(recipe())["fetch"].disk == ()  # a folder is read in place
    fp8 = needs(recipe(name="llama3-70b-fp8"))["compress"]
    assert fp8.disk_bytes == promised_bytes(llama_70b.checkpoint(), recipe(name="llama3-70b-fp8"))
    unpacked = needs(recipe(), "cpu", unpacks=True)["measure-candidate"]
    assert unpacked.disk_bytes - found["measure-candidate"] == 141_107_412_992
    merged = needs(recipe("model.adapter=someone/lora"))["fetch"]
    assert merged.disk_bytes == 141_107_412_992
    assert merged.host.certain == 141_107_412_992 + 4 * (LINEARS + 2 * D)


def test_the_engine_that_holds_the_whole_model() -> None:
    whole = needs(recipe("quantize.engine=llmcompressor"))["compress"]
    assert whole.host.certain == 141_107_412_992
    assert whole.device is not None and whole.device.certain > 4 * M**2
    assert needs(recipe())["compress"].host.bytes < 20 * 10**9
    assert needs(recipe(), "cpu")["compress"].device is None


def test_the_70b_recipe_on_common_cards() -> None:
    cards = {one.card.name: one for one in figures().cards}
    assert [name for name, one in cards.items() if not one.quantizes] == ["MI300X"]  # no CUDA
    assert all(one.serves for one in cards.values())
    assert {name: one.baseline for name, one in cards.items()} == {
        "RTX 3090": 8,
        "A10": 8,
        "RTX 4090": 8,
        "L4": 8,
        "RTX 5090": 8,
        "A100 40GB": 8,
        "RTX 6000 Ada": 4,
        "L40S": 4,
        "A100 80GB": 4,
        "H100": 4,
        "RTX PRO 6000 Blackwell": 2,
        "H200": 2,
        "B200": 1,
        "MI300X": 1,
    }
    assert cards["RTX 5090"].context[1] == 0
    assert cards["H100"].context[1] == int((0.9 * 80e9 - 39_767_794_432 - 2e9) // (320 << 10))
    int8 = figures("quantize.method=int8", "quantize.scheme=W8A8", "quantize.group_size=null").cards
    blackwell = ["RTX 5090", "RTX PRO 6000 Blackwell", "B200"]
    assert [one.card.name for one in int8 if not one.serves] == blackwell
    groups = figures("quantize.group_size=8192", "quantize.ignore=['re:.*down_proj', 'lm_head']")
    assert groups.cards[0].context[2] is None  # o_proj's one group cannot be halved


def test_money() -> None:
    assert dollars(2.0, 5400) == 3.0
    assert dollars_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    money = Money({"": 2.5, "l4": 0.9}, {"h100": 2500, "l4": 250})
    assert money.per_million("H100") == pytest.approx(2.5 / 9)
    assert money.per_million("L4") == pytest.approx(1.0)
    assert money.per_million("A10") is None
    priced = figures("machine.gpu=H100", money=money)
    compress = next(one for one in priced.stages if one.needs.stage == "compress")
    assert compress.at_least and compress.seconds is not None and compress.cost is not None
    assert compress.cost == pytest.approx(2.5 * compress.seconds / 3600)
    assert next(one for one in priced.stages if one.needs.stage == "fetch").seconds is None
    four = figures("machine.gpu=H100", "machine.gpus=4").stages[2]
    assert four.seconds == pytest.approx(compress.seconds / 4)  # data parallel


def test_the_least_time_is_operations_over_the_rate() -> None:
    linears = (Linear("mlp.up_proj", 8, 4), Linear("mlp.down_proj", 4, 8))
    model = Decoder(4, 3, linears, 64, 0, 0)
    run = Run("gptq", 100, 10, "cuda")
    whole, last = 2 * (64 + 10 * 4) * 100, 2 * 32 * 100
    grams = 100 * (4 * 4 + 8 * 8)
    columns = 8 * 4**2 + 4 * 8**2 + (4**3 + 8**3) / 3
    expected = 3 * (whole - last + grams + columns) + 2 * whole
    assert operations(model, run) == pytest.approx(expected)
    assert operations(model, Run("awq", 100, 10, "cuda")) == 3 * (whole + grams) - last
    assert operations(model, Run("fp8", 0, 0, "cuda")) == 0
    assert least_seconds(model, run, 1e-9) == pytest.approx(expected / 1000)
    experts = tuple(Linear(f"mlp.experts.{n}.up_proj", 8, 4) for n in range(9))
    sparse = Decoder(4, 3, (*linears, *experts), 64, 0, 0)
    assert operations(sparse, run) == operations(model, run)  # a token reaches few of them


def test_constants_are_the_engines() -> None:
    """The core cannot import the engine, which needs torch."""
    engine = shipped_root() / "quantize" / "engine"
    text = "\n".join((engine / f"{name}.py").read_text() for name in ("hidden", "stream", "clip"))
    assert f"BATCH_TOKENS = {json.dumps(BATCH_TOKENS)}" in text
    assert f"\nSAMPLED_TOKENS = {SAMPLED_TOKENS}\n" in text
    assert f"\nCHUNK = 1 << {CLIPPED_TOGETHER.bit_length() - 1}\n" in text


def test_the_table_of_cards_is_sound() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS) == len(json.loads(FILE.read_text()))
    assert [card.gigabytes for card in CARDS] == sorted(card.gigabytes for card in CARDS)
    assert all(card.source.startswith("https://") and card.bandwidth > 0 for card in CARDS)
    assert [(gpu.gigabytes, gpu.names) for gpu in GPUS] == [
        (24, "RTX 4090, L4"),
        (48, "L40S"),
        (80, "A100 80GB, H100"),
        (141, "H200"),
        (192, "MI300X"),
    ]
    formats = {card.name: card.formats for card in CARDS}
    assert formats["A10"] == "INT8" and formats["L4"] == "INT8, FP8"
    assert formats["B200"] == "INT8, FP8, FP4"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", None),  # 94 GB
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # 16 GB
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("h100", "H100"),
        ("rtx4090", "RTX 4090"),
        ("TPU v5e", None),
    ],
)
def test_cards_by_the_names_that_drivers_print(name: str, card: str | None) -> None:
    found = find_card(name)
    assert (found.name if found else None) == card


def test_the_figures_of_the_docs() -> None:
    """docs/capacity.md's worked example."""
    text = (shipped_root() / "docs" / "capacity.md").read_text()
    checkpoint, given = llama_70b.checkpoint(), recipe("machine.gpu=H100")
    model, run = decoder(checkpoint, given.quantize), Run("awq+gptq", 512 * 2048, 2048, "cuda")
    steps = {  # the largest of each step, without the layer and its Gram matrices
        moments[0].when: max(sum(part.bytes for part in one.parts[2:]) for one in moments)
        for moments in _by_step(model, run)
    }
    steps["packing"] = sum(part.bytes for part in _moments(model, run)[0].parts[1:3])
    for step, count in steps.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {step}"))
        assert row.endswith(f"| {count / 1e9:.1f} GB |"), (step, count)
    found = needs(given)["compress"]
    assert found.device is not None
    shape = attention(llama_70b.CONFIG)
    assert isinstance(shape, dict)
    size = promised_bytes(checkpoint, given)
    minutes = least_seconds(model, run, 989) / 60
    price = dollars_per_million_tokens(2.5, 600)
    for said in (
        f"{model.layer_elements:,}",
        f"{model.outside_elements:,}",
        f"{checkpoint.parameters:,}",
        f"**{size / 1e9:.1f} GB**",
        f"{2 * checkpoint.parameters / 1e9:.1f} GB",
        f"{share_bytes_per_token(shape, 1):,} bytes",
        f"{context_tokens(80 * 10**9, 0.9, size, shape) // 100 * 100:,} tokens",
        f"{context_tokens(24 * 10**9, 0.9, size, shape, 4) // 100 * 100:,}",
        f"{32768 * share_bytes_per_token(shape, 1) / 1e9:.1f} GB",
        f"{found.device.bytes / 1e9:.1f} GB. So a card of 24 GB quantizes it",
        f"a 70B takes {found.host.bytes / 1e9:.0f} GB",
        f"4 *T d* = {found.disk[1].bytes / 1e9:.1f} GB",
        f"H100: {minutes:.1f} minutes",
        f"tokens a second: {price:.2f}",
    ):
        assert said in text, said


def _by_step(model: Decoder, run: Run) -> list[list[Peak]]:
    found: dict[str, list[Peak]] = {}
    for peak in _moments(model, run):
        if peak.when not in ("packing", "embedding"):
            found.setdefault(peak.when, []).append(peak)
    return list(found.values())
