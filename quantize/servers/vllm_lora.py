"""vLLM's flags for a LoRA adapter beside its base, for the server and for the card."""

from __future__ import annotations

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be in vLLM 0.32 (`vllm/config/lora.py`)."""


def adapter_options(name: str, place: str, rank: int) -> list[str]:
    """Flags that serve the adapter in `place`; requests give its `name` as their model."""
    largest = next(size for size in RANKS if size >= rank)
    return ["--enable-lora", "--lora-modules", f"{name}={place}", "--max-lora-rank", str(largest)]
