"""Random BF16 checkpoints of Llama's shapes, a few layers deep.

    python random_llama.py 8B|70B|tiny FOLDER

Runs in the llmcompressor environment.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A Llama, with fewer layers than the model it stands for."""

    name: str
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int
    whole: int  # layers of the model it stands for
    layers: int

    @property
    def narrow(self) -> int:
        """Rows of the key and value projections."""
        return self.key_value_heads * (self.hidden // self.heads)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's linears: (rows, columns)."""
        d, m = self.hidden, self.inner
        rows = {"q": d, "k": self.narrow, "v": self.narrow, "o": d}
        attention = {f"self_attn.{part}_proj": (count, d) for part, count in rows.items()}
        mlp = {"mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}
        return attention | mlp

    @property
    def parameters(self) -> int:
        """Of a layer's linears."""
        return sum(rows * columns for rows, columns in self.linears.values())


SHAPES = {
    shape.name: shape
    for shape in (
        # config.json of meta-llama/Llama-3.1-8B and Llama-3.1-70B
        Shape("8B", 4096, 14336, 32, 8, 128256, whole=32, layers=3),
        Shape("70B", 8192, 28672, 64, 8, 128256, whole=80, layers=2),
        Shape("tiny", 128, 384, 4, 2, 2048, whole=5, layers=3),
        # for bench/memory.py: a wide MLP, a large vocabulary, Llama-3.2-1B's layers
        Shape("narrow", 512, 4096, 8, 8, 4096, whole=16, layers=3),
        Shape("vocabulary", 1024, 2816, 16, 4, 128256, whole=16, layers=2),
        Shape("1B", 2048, 8192, 32, 8, 128256, whole=16, layers=2),
    )
}


def build(shape: Shape, folder: Path) -> None:
    """A shard a layer, one for the embedding and one for the head."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU takes a minute for the 70B's

    def matrix(rows: int, columns: int) -> torch.Tensor:
        empty = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return empty.normal_(std=0.02).cpu()

    def norm() -> torch.Tensor:
        return torch.empty(shape.hidden, dtype=torch.bfloat16).log_normal_(std=0.5)

    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    outside = {"model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden)}
    save("outside.safetensors", outside | {"model.norm.weight": norm()})
    save("head.safetensors", {"lm_head.weight": matrix(shape.vocabulary, shape.hidden)})
    for layer in range(shape.layers):
        tensors = {name: matrix(*size) for name, size in shape.linears.items()}
        tensors |= {"input_layernorm": norm(), "post_attention_layernorm": norm()}
        named = {f"model.layers.{layer}.{name}.weight": value for name, value in tensors.items()}
        save(f"layer-{layer}.safetensors", named)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    build(SHAPES[sys.argv[1]], Path(sys.argv[2]))
