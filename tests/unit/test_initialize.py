import json
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import SourceError, UsageError
from quantize.initialize import initial_recipe, scalar
from quantize.recipe import Recipe
from quantize.recipe_file import load_recipe
from quantize.resources import shipped_root
from quantize.schemes import MADE_HERE
from quantize.yaml_values import parse

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 1024,
}
SHAPES = {
    "model.embed_tokens.weight": (32, 256),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.k_proj.weight": (128, 256),
    "model.layers.0.self_attn.v_proj.weight": (128, 256),
    "model.layers.0.self_attn.o_proj.weight": (256, 256),
    "model.layers.0.mlp.up_proj.weight": (512, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
    "lm_head.weight": (32, 256),
}
CARD = "---\nbase_model: owner/base\nlicense: mit\n---\nText.\n"


def write_weights(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A safetensors file of BF16 zeros: header length, header, data."""
    header: dict[str, Any] = {}
    start = 0
    for name, (rows, columns) in shapes.items():
        end = start + rows * columns * 2
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(start))


def checkpoint(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, int]] | None = None,
    template: bool = True,
    card: str = CARD,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text(card)
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_weights(folder / "model.safetensors", shapes or SHAPES)
    return folder


def loaded(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return load_recipe(path)


@pytest.mark.parametrize("method", MADE_HERE)
def test_every_method_gives_a_recipe_that_loads(tmp_path: Path, method: str) -> None:
    folder = checkpoint(tmp_path / "My Model (v2)")
    text = initial_recipe(str(folder), method)
    schema = shipped_root() / "recipes/recipe.schema.json"
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={schema.as_uri()}"
    recipe = loaded(tmp_path, text)
    assert recipe.name == f"my-model-v2-{method.replace('+', '-')}"
    assert recipe.quantize.method == method
    assert recipe.model.source == str(folder)
    assert recipe.model.base == "owner/base"
    assert (recipe.calibration is not None) == recipe.quantize.needs_calibration
    grouped = method in ("awq", "gptq", "awq+gptq", "rtn")
    assert recipe.quantize.group_size == (128 if grouped else None)
    assert recipe.serve.max_model_len == 1024
    assert recipe.serve.tensor_parallel_size == 1
    assert recipe.evaluate is not None and recipe.evaluate.suite == "smoke"


def test_group_and_parallel_sizes_divide_every_layer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    # o_proj has 256 input channels: two GPUs with groups of 128, not four
    assert loaded(tmp_path, initial_recipe(str(folder), "awq")).serve.tensor_parallel_sizes == (
        1,
        2,
    )
    odd = SHAPES | {
        "model.layers.0.mlp.up_proj.weight": (448, 256),
        "model.layers.0.mlp.down_proj.weight": (256, 448),
    }
    recipe = loaded(tmp_path, initial_recipe(str(checkpoint(tmp_path / "odd", shapes=odd)), "gptq"))
    assert recipe.quantize.group_size == 64
    assert recipe.serve.tensor_parallel_sizes == (1,)  # 448 = 7 groups of 64


def test_no_group_size_divides(tmp_path: Path) -> None:
    shapes = SHAPES | {"model.layers.0.mlp.down_proj.weight": (256, 500)}
    folder = checkpoint(tmp_path / "m", shapes=shapes)
    with pytest.raises(SourceError, match="divides 500 input channels"):
        initial_recipe(str(folder), "awq")
    assert loaded(tmp_path, initial_recipe(str(folder), "fp8")).quantize.group_size is None


def test_routers_stay_in_bf16(tmp_path: Path) -> None:
    shapes = SHAPES | {
        "model.layers.0.mlp.gate.weight": (8, 256),
        "model.layers.0.mlp.experts.0.gate_proj.weight": (512, 256),
        "model.layers.0.mlp.experts.0.down_proj.weight": (256, 512),
    }
    recipe = loaded(
        tmp_path, initial_recipe(str(checkpoint(tmp_path / "moe", shapes=shapes)), "awq")
    )
    assert recipe.quantize.ignore == ("lm_head", r"re:.*mlp\.gate$")


def test_without_a_chat_template(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", template=False, card="no front matter\n")
    text = initial_recipe(str(folder), "awq")
    recipe = loaded(tmp_path, text)
    assert recipe.calibration is not None and recipe.calibration.packing
    assert recipe.model.base is None
    assert "# license:" in text


@pytest.mark.parametrize(
    ("base", "expected"),
    [("no", "no"), ("[a/b]", "a/b"), ("[a/b, c/d]", None), ('"x: # y"', "x: # y")],
)
def test_base_model_of_the_card(tmp_path: Path, base: str, expected: str | None) -> None:
    card = f"---\nbase_model: {base}\n---\n"
    recipe = loaded(tmp_path, initial_recipe(str(checkpoint(tmp_path / "m", card=card)), "fp8"))
    assert recipe.model.base == expected


@pytest.mark.parametrize("method", MADE_HERE)
def test_hub_repository(tmp_path: Path, method: str) -> None:
    recipe = loaded(tmp_path, initial_recipe("owner/Some_Model-8B", method))
    assert recipe.model.source == "owner/Some_Model-8B"
    assert recipe.model.revision == "main"
    assert recipe.name == f"some_model-8b-{method.replace('+', '-')}"
    assert recipe.evaluate is not None and recipe.evaluate.suite == "standard"


def test_name(tmp_path: Path) -> None:
    assert loaded(tmp_path, initial_recipe("a/b", "fp8", "mine")).name == "mine"
    with pytest.raises(UsageError) as caught:
        initial_recipe("a/b", "fp8", "My Name")
    assert "'my-name'" in caught.value.hint


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no method 'awk'"):
        initial_recipe("a/b", "awk")
    with pytest.raises(SourceError, match=r"no folder '\./absent'"):
        initial_recipe("./absent", "awq")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"config\.json"):
        initial_recipe(str(tmp_path / "empty"), "awq")


@pytest.mark.parametrize(
    "text", ["a/b", "no", "1e5", "~", "a b", "# x", "2024-01-01", 'q"q', "[a]"]
)
def test_scalars_are_read_back(text: str) -> None:
    document = parse(f"key: {scalar(text)}\n")
    assert document.problems == []
    assert document.value == {"key": text}
