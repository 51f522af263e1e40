"""Names of modules: how recipes name them, and which of them are served as one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")
JOINED = re.compile(r"^(?:(.*\.)?)(?:(?P<qkv>[qkv]_proj)|(?P<gate_up>gate_proj|up_proj))$")


def module_name(tensor: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` → `model.layers.0.mlp.up_proj`."""
    return tensor.rpartition(".")[0]


def matches(module: str, patterns: Sequence[str]) -> bool:
    """Whether a module is named by a list of names and `re:` patterns.

    The rule of compressed-tensors (`utils/match.py`, match_name): a pattern matches from the start
    of the full name on; anything else must equal it.
    """
    return any(
        re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module
        for entry in patterns
    )


def nearest(entry: str, modules: Sequence[str]) -> list[str]:
    """At most three modules whose names are most like an entry that matches none."""
    if not entry.startswith("re:"):
        near = difflib.get_close_matches(entry, modules, 3, 0.75)
        if near:
            return near
    last = {module.rpartition(".")[2]: module for module in reversed(modules)}  # the first of each
    words = re.findall(r"[A-Za-z]\w+", re.sub(r"\\.", " ", entry.removeprefix("re:")))
    near = difflib.get_close_matches(words[-1], list(last), 3, 0.6) if words else []
    return [last[name] for name in near] or list(modules[:1])


def served_unit(module: str) -> str:
    """What vLLM makes one matrix of, so that one format must hold for it.

    `…self_attn.qkv` for q, k and v, `…mlp.gate_up` for gate and up, `…mlp.experts` for all linears
    of all experts of a layer (`packed_modules_mapping` of its models, FusedMoE); else the module.
    """
    if expert := EXPERT.match(module):
        return expert[1]
    if joined := JOINED.match(module):
        return (joined[1] or "") + ("qkv" if joined["qkv"] else "gate_up")
    return module
