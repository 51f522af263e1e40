"""vLLM's flags for a LoRA adapter beside its base, for the server and for the card."""

from __future__ import annotations

from collections.abc import Sequence

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be in vLLM 0.32 (`vllm/config/lora.py`)."""


def adapter_options(name: str, place: str, rank: int, targets: Sequence[str]) -> list[list[str]]:
    """Flags with their values that serve the adapter in `place` under `name`, as requests give it.

    `targets` are the last parts of its modules' names. Left alone, vLLM 0.32 makes room for LoRA on
    the head, too, and then fails on prompt log-probabilities of several requests at once.
    """
    largest = next(size for size in RANKS if size >= rank)
    return [
        ["--enable-lora"],
        ["--lora-modules", f"{name}={place}"],
        ["--max-lora-rank", str(largest)],
        ["--lora-target-modules", *targets],
    ]
