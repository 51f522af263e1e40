"""Money: what a run and what a million tokens cost, from a price an hour."""

from __future__ import annotations


def dollars(price_per_hour: float, seconds: float) -> float:
    """Price an hour x seconds / 3600, in the price's currency."""
    return price_per_hour * seconds / 3600


def dollars_per_million_tokens(price_per_hour: float, tokens_per_second: float) -> float:
    """Price an hour / (tokens a second x 3600) x 10^6, in the price's currency.

    The price is that of all GPUs that together give this throughput; input and output tokens cost
    differently, so the throughput must be of the mix that is paid for.
    """
    return price_per_hour / (tokens_per_second * 3600) * 1e6
