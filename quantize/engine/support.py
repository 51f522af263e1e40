"""Which checkpoints the streaming engine takes. Standard library only: the core reads it, too."""

from __future__ import annotations

from collections.abc import Iterable

VERIFIED = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""Architectures (config.json's `architectures`) that parity with `oneshot` is tested on."""


NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")
"""Parts of the last part of a linear's name whose ranges AWQ leaves alone, as AutoAWQ does."""


def why_not(architecture: str, ignore: Iterable[str]) -> str | None:
    """Why this checkpoint goes to llm-compressor's `oneshot` instead; None if it need not."""
    if architecture not in VERIFIED:
        return f"the streaming engine is not verified on {architecture}"
    if "lm_head" not in ignore:
        return "the streaming engine leaves lm_head in BF16, and the recipe does not ignore it"
    return None
