"""What goes through a layer: input statistics, hidden states in a file, the journal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from quantize.engine.hidden import Batch, HiddenStates, Sequences
from quantize.engine.inputs import Inputs, LayerEnds, Watch
from quantize.engine.journal import NAME, Journal
from quantize.protocol import WorkerError
from tests.end_to_end.algebra_data import activations

LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def gram_matrices() -> dict[str, Any]:
    """H against float64, at widths on both sides of a block's, taken up in unequal batches."""
    figures: dict[str, Any] = {}
    for columns, every in ((64, 1), (256, 3), (300, 1), (520, 2), (2200, 1)):
        random = np.random.default_rng(columns)
        x = activations(700, columns, columns)
        inputs = Inputs.empty(columns, torch.device("cpu"))
        taken, start = [], 0
        while start < len(x):
            batch = x[start : start + int(random.integers(1, 300))]
            inputs.add(batch[None] if start else batch, every)
            taken.append(batch[::every])
            start += len(batch)
        inputs.complete()
        rows = torch.cat(taken).double()
        exact = rows.T @ rows
        # Float32 sums of exact products: |error| <= tokens * 2^-24 * sum |x_i x_j|.
        bound = len(rows) * 2.0**-24 * (rows.abs().T @ rows.abs())
        figures[f"{columns} columns"] = worst = float(
            ((inputs.gram.double() - exact).abs() / bound.clamp(min=1e-30)).max()
        )
        assert worst <= 0.1, figures
        assert torch.equal(inputs.gram, inputs.gram.T)
        assert (inputs.tokens, inputs.sampled) == (len(x), len(rows))
        absolute = x.double().abs().sum(0)
        assert torch.allclose(inputs.absolute.double(), absolute, rtol=1e-5)
    return figures


def nothing_seen() -> dict[str, Any]:
    """A batch without tokens, which an expert gets that no token is routed to, changes nothing."""
    inputs = Inputs.empty(32, torch.device("cpu"))
    inputs.add(torch.empty(0, 32, dtype=torch.bfloat16), 1)
    inputs.complete()
    assert inputs.tokens == inputs.sampled == 0 and not inputs.gram.any()
    return {}


class Llama:
    """One decoder layer, and calls to it on random hidden states."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        config = LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        self.rotary = LlamaRotaryEmbedding(config)
        self.layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16).eval()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        output = self.layer(hidden, position_embeddings=self.rotary(hidden, positions))
        return output[0] if isinstance(output, tuple) else output

    def inputs(self, batches: list[torch.Tensor], every: int) -> dict[str, torch.Tensor]:
        """Each linear's inputs (tokens, columns), every so-many-th of each batch."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args: seen[name].append(args[0].flatten(0, -2)[::every])

        hooks = [
            self.layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in LINEARS
        ]
        for batch in batches:
            self(batch)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}


def watch_a_layer() -> dict[str, Any]:
    """Four records for seven linears; each is H of that linear's own inputs."""
    llama = Llama()
    random = torch.Generator().manual_seed(2)
    shapes = ((3, 40), (2, 40), (1, 17))
    batches = [torch.randn(*shape, 128, generator=random).to(torch.bfloat16) for shape in shapes]
    figures = {}
    for every in (1, 3):
        expected = llama.inputs(batches, every)
        watch = Watch(llama.layer, LINEARS, LINEARS, every)
        with watch.hooked(stop_early=False):
            for batch in batches:
                llama(batch)
                watch.end_of_pass()
        assert len(watch.inputs) == 4
        assert [record.readers for record in watch.inputs.values()] == [
            list(LINEARS[:3]),
            [LINEARS[3]],
            list(LINEARS[4:6]),
            [LINEARS[6]],
        ]
        for record in watch.inputs.values():
            record.complete()
        for name in LINEARS:
            found, x = watch.of(name), expected[name].double()
            assert found is not None
            assert (found.tokens, found.sampled) == (3 * 40 + 2 * 40 + 17, len(x))
            error = (found.gram.double() - x.T @ x).norm() / (x.T @ x).norm()
            figures[f"{name}, every {every}"] = float(error)
            assert error < 1e-6, figures
    return figures


def layer_ends() -> dict[str, Any]:
    """From the second pass on, nothing behind the last watched input is computed."""
    llama = Llama()
    ran: list[str] = []
    for name in ("mlp.act_fn", "mlp.down_proj", "mlp"):
        llama.layer.get_submodule(name).register_forward_hook(
            lambda *_, name=name: ran.append(name)
        )
    watch = Watch(llama.layer, LINEARS, LINEARS)
    hidden = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    with watch.hooked(stop_early=True):
        for number in range(3):
            try:
                llama(hidden)
                assert number == 0, "the second pass ran to its end"
            except LayerEnds:
                assert number > 0, "the first pass shows the order, and runs to its end"
            watch.end_of_pass()
    assert ran == ["mlp.act_fn", "mlp.down_proj", "mlp", "mlp.act_fn", "mlp.act_fn"], ran
    assert {record.tokens for record in watch.inputs.values()} == {54}
    llama(hidden)  # the hooks are gone
    assert ran[-1] == "mlp"
    return {}


def sequences() -> dict[str, Any]:
    """Batches: equal lengths, contiguous, within the limit, every token once, none empty."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        lengths = random.integers(0, 5, 30) * random.integers(1, 40)
        ids = random.integers(0, 1000, lengths.sum()).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        limit = int(random.integers(1, 200))
        made = Sequences(ids, offsets, limit)
        assert made.tokens == lengths.sum()
        position, rows = 0, []
        for batch in made.batches:
            assert batch.start == position and batch.length > 0
            assert batch.count == 1 or batch.tokens <= limit
            part = made.batch_ids(batch)
            assert part.shape == (batch.count, batch.length) and part.dtype == torch.int64
            rows += [tuple(row) for row in part.tolist()]
            position += batch.tokens
        assert position == made.tokens
        wanted = [tuple(ids[a:b].tolist()) for a, b in pairwise(offsets)]
        assert sorted(rows) == sorted(row for row in wanted if row)
    return {}


def hidden_states() -> dict[str, Any]:
    """What is written is read, bit by bit; a file that has not got its name is incomplete."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(8):
            random = np.random.default_rng(seed)
            lengths = random.integers(1, 30, 12)
            ids = np.zeros(lengths.sum(), np.int32)
            made = Sequences(ids, np.concatenate([[0], np.cumsum(lengths)]), 40)
            bits = torch.from_numpy(random.integers(-(2**15), 2**15, (made.tokens, 24), np.int16))
            states = bits.view(torch.bfloat16)
            file = HiddenStates(Path(folder, f"{seed}.bin"), 24, device)
            shuffled = [made.batches[i] for i in random.permutation(len(made.batches))]
            with file.writing() as write:
                for batch in shuffled:
                    part = states[batch.start : batch.start + batch.tokens]
                    write(batch, part.view(batch.count, batch.length, 24))
            assert not file.complete(made.tokens)
            file.finish()
            assert file.complete(made.tokens) and not file.complete(made.tokens + 1)
            assert Path(folder, f"{seed}.bin").read_bytes() == bits.numpy().tobytes()
            with file.reading() as read:
                for batch in made.batches:
                    part = read(batch)
                    assert part.shape == (batch.count, batch.length, 24)
                    expected = bits[batch.start : batch.start + batch.tokens]
                    assert torch.equal(part.contiguous().view(torch.int16).view(-1, 24), expected)
    return {}


def hidden_states_held() -> dict[str, Any]:
    """What stays on the device is read bit by bit, with a file and without; batches may differ."""
    device = torch.device("cpu")
    random = torch.Generator().manual_seed(5)
    with tempfile.TemporaryDirectory() as folder:
        for on_disk in (True, False):
            path = Path(folder, "held.bin")
            held = HiddenStates(path, 24, device, hold=True, on_disk=on_disk)
            states = torch.randn(12, 5, 24, generator=random).to(torch.bfloat16)
            with held.writing() as write:
                for start in (0, 4, 8):
                    write(Batch(5 * start, 4, 5), states[start : start + 4])
            held.finish()
            assert held.complete(60) == path.exists() == on_disk
            with held.reading() as read:
                for start, count in ((0, 4), (4, 2), (0, 12), (4, 7)):
                    part = read(Batch(5 * start, count, 5))
                    assert torch.equal(part, states[start : start + count]), (on_disk, start, count)
            held.release()
            path.unlink(missing_ok=True)
    return {}


def _filled(folder: Path) -> tuple[dict[str, Any], Journal]:
    belongs_to = {"engine": 1, "checkpoint": "a", "quantize.method": "awq"}
    journal = Journal(folder, belongs_to)
    for part in ("outside", 0, 1):
        journal.finish(part, {f"{part}.weight": torch.arange(12.0).view(3, 4)}, seconds=1.5)
    return belongs_to, journal


def journal_torn() -> dict[str, Any]:
    """Cut anywhere, the file keeps its whole lines and takes further ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        belongs_to, _ = _filled(folder)
        whole = (folder / NAME).read_bytes()
        ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
        for cut in range(len(whole) + 1):
            (folder / NAME).write_bytes(whole[:cut])
            kept = Journal(folder, belongs_to)
            lines = max(number for number, end in enumerate(ends) if end <= cut)
            assert list(kept.entries) == ["outside", "0", "1"][: max(lines - 1, 0)], cut
            first = (folder / NAME).read_bytes()
            assert first == whole[: ends[max(lines, 1)]], cut
        kept.finish(2, {"2.weight": torch.zeros(2)})
        assert list(Journal(folder, belongs_to).entries) == ["outside", "0", "1", "2"]
    return {}


def journal_forgets() -> dict[str, Any]:
    """Parts that are to be done again are gone, on disk as well; the others stay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        belongs_to, journal = _filled(folder)
        journal.forget(range(1, 5))
        assert (
            list(journal.entries) == list(Journal(folder, belongs_to).entries) == ["outside", "0"]
        )
        journal.finish(1, {"1.weight": torch.zeros(2)})
        assert list(Journal(folder, belongs_to).entries) == ["outside", "0", "1"]
        before = (folder / NAME).read_bytes()
        Journal(folder, belongs_to, writes=False).forget([0])
        assert (folder / NAME).read_bytes() == before
    return {}


def journal_foreign() -> dict[str, Any]:
    """Other inputs are refused, by the names of what changed, and nothing is lost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        belongs_to, _ = _filled(folder)
        before = (folder / NAME).read_bytes()
        for changes in ({"checkpoint": "b"}, {"checkpoint": "b", "engine": 2}, {"new": 1}):
            try:
                Journal(folder, belongs_to | changes)
            except WorkerError as error:
                assert error.kind == "ConflictError" and str(folder) in error.hint
                named = error.message.partition("other inputs: ")[2]
                assert named == f"{', '.join(sorted(changes))} changed", error.message
            else:
                raise AssertionError(f"{changes} were taken for the same inputs")
            assert (folder / NAME).read_bytes() == before
    return {}


def journal_shards() -> dict[str, Any]:
    """A missing or short shard is a part that is not finished; a damaged one is found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        belongs_to, journal = _filled(folder)
        journal.check()
        shard = folder / journal.entries["0"]["shard"]
        sound = shard.read_bytes()
        for damage in (None, b"", sound[:-1], sound + b"\0"):
            shard.unlink()
            if damage is not None:
                shard.write_bytes(damage)
            assert list(Journal(folder, belongs_to).entries) == ["outside", "1"]
            shard.write_bytes(sound)
        shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        reopened = Journal(folder, belongs_to)
        assert list(reopened.entries) == ["outside", "0", "1"]
        try:
            reopened.check()
        except WorkerError as error:
            assert error.kind == "ResourceError" and str(shard) in error.message
        else:
            raise AssertionError("one flipped bit went unnoticed")
        # Done again: the later line is the one that counts.
        reopened.finish(0, {"0.weight": torch.ones(5)})
        Journal(folder, belongs_to).check()
        line = json.loads((folder / NAME).read_text().splitlines()[-1])
        assert line["part"] == "0" and line["tensors"] == {"0.weight": 20}
    return {}


CHECKS = {
    "inputs_gram_matrices": gram_matrices,
    "inputs_nothing_seen": nothing_seen,
    "watch_a_layer": watch_a_layer,
    "watch_layer_ends": layer_ends,
    "hidden_sequences": sequences,
    "hidden_states": hidden_states,
    "hidden_states_held": hidden_states_held,
    "journal_torn": journal_torn,
    "journal_forgets": journal_forgets,
    "journal_foreign": journal_foreign,
    "journal_shards": journal_shards,
}
