"""Names of modules: patterns, likeness, and what is served as one."""

import pytest

from quantize.modules import matches, module_name, nearest, served_unit


@pytest.mark.parametrize(
    ("module", "patterns", "expected"),
    [
        ("lm_head", ["lm_head"], True),
        ("model.lm_head", ["lm_head"], False),
        ("model.layers.0.mlp.gate", ["re:.*mlp.gate$"], True),
        ("model.layers.0.mlp.gate_proj", ["re:.*mlp.gate$"], False),
        ("model.layers.0.mlp.gate", ["re:mlp"], False),  # from the start of the name, like re.match
        ("model.layers.10.mlp", ["x", "re:model.layers.1.*"], True),
    ],
)
def test_ignore_patterns(module: str, patterns: list[str], expected: bool) -> None:
    assert matches(module, patterns) is expected


def test_module_names() -> None:
    assert module_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj"


MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("re:.*dwn_proj$", "model.layers.0.mlp.down_proj"),
        (r"re:model\.layer\.0\.self_attn\.k_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.1.mlp.up_prj", "model.layers.1.mlp.up_proj"),
        ("o_proj", "model.layers.0.self_attn.o_proj"),
        ("re:.*", "model.layers.0.self_attn.q_proj"),
        ("xyz", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_nearest(entry: str, expected: str) -> None:
    assert nearest(entry, MODULES)[0] == expected


def test_nearest_of_none() -> None:
    assert nearest("re:.*down", []) == []


@pytest.mark.parametrize(
    ("module", "unit"),
    [
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("model.layers.0.mlp.experts.17.down_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.mlp.shared_expert.gate_proj", "model.layers.0.mlp.shared_expert.gate_up"),
        ("q_proj", "qkv"),
        ("lm_head", "lm_head"),
    ],
)
def test_what_is_served_as_one(module: str, unit: str) -> None:
    assert served_unit(module) == unit
