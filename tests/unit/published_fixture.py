"""A checkpoint that was really published: card and publish stage on small artifacts."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from records_fixture import (
    RECIPE,
    artifact,
    baseline_side,
    candidate_side,
    card_inputs,
    new_store,
    stage_context,
)

from quantize.environments import Environments
from quantize.progress import LineView, Progress
from quantize.runner import Runner
from quantize.stages import card, publish
from quantize.store import Artifact

CANDIDATE_BYTES = 4096


def weights(count: int) -> bytes:
    """A safetensors file of `count` bytes with one tensor, by the format's description."""
    header = b""
    for _ in range(2):  # the header's length is part of what it says
        data = count - 8 - len(header)
        value = {"weight": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}
        header = json.dumps(value).encode().ljust(96)
    return struct.pack("<Q", len(header)) + header + bytes(range(256)) * 99


def write_key(folder: Path, password: str | None = None, curve: Any = None) -> tuple[Path, Path]:
    """A new key pair on disk, as PEM: private, public."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    private, public = folder / "signing-key.pem", folder / "signing-key.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


class Publishing:
    """Artifacts in a store below `root`, and the stages that publish them."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, new_store(root)
        self.inputs = card_inputs(
            self.store, baseline_side(), dataclasses.replace(candidate_side(), weight_bytes=1)
        )
        self.inputs["compress"] = artifact(
            self.store,
            "compress",
            "real",
            {
                "compress.json": self.inputs["compress"].json("compress.json"),
                "model/model.safetensors": weights(CANDIDATE_BYTES)[:CANDIDATE_BYTES],
                "model/config.json": {"model_type": "llama"},
            },
            versions={"llmcompressor": "0.14.0.1", "torch": "2.13.0"},
            key_inputs={"locks": {"llmcompressor": "7" * 64}},
        )

    def run(self, block: Mapping[str, Any], key: str = "1") -> Artifact:
        """Publish to the targets of a recipe's `publish` block."""
        recipe = {**RECIPE, "publish": block}
        folder = self.root / f"stages-{len(list(self.root.glob('stages-*')))}"
        (folder / "card").mkdir(parents=True)
        context = stage_context(folder / "card", self.store, "card", self.inputs, recipe)
        card.run(context)
        made = {
            "README.md": (context.files / "README.md").read_bytes(),
            "record.json": (context.files / "record.json").read_bytes(),
        }
        with self.store.staging("publish", key) as staging:
            runner = Runner(
                Environments("cpu", self.root / "cache"),
                self.root / "logs",
                Progress(LineView(lambda _line: None)),
            )
            paths = {"model": self.root / "instruct"}  # a local source, as the record has it
            context = dataclasses.replace(
                context,
                resolved=dataclasses.replace(context.resolved, paths=paths),
                entry=dataclasses.replace(context.entry, id="publish", kind="publish", key=key),
                inputs={
                    "compress": self.inputs["compress"],
                    "card": artifact(self.store, "card", f"card-{folder.name}", made),
                },
                files=staging.files,
                work=staging.work,
                runner=runner,
            )
            publish.run(context)
            return self.store.commit(
                staging, key_inputs={}, recipe="tiny", seconds={}, versions=context.versions
            )
