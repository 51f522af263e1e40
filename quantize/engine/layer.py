"""One decoder layer: watch its inputs, scale, round, hand on its outputs, pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.modifiers.quantization.calibration import observe, update_qparams
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping

from quantize.engine import awq, clip, gptq, nearest, sensitivity
from quantize.engine.hidden import Batch, HiddenStates
from quantize.engine.inputs import Inputs, LayerEnds, Watch
from quantize.engine.probe import TOKENS as PROBE_TOKENS
from quantize.engine.probe import Probe, parent_of
from quantize.engine.ranks import Ranks
from quantize.engine.skeleton import DTYPE, Calls
from quantize.engine.source import Tensors

Advance = Callable[[float], None]
"""Called with the share of the layer that is done, 0 to 1."""

ACTIVATIONS = ("input", "k", "v")
"""What upstream's observers of activations are called."""

WATCHED, SEARCHED, ROUNDED, HANDED_ON = 0.35, 0.55, 0.75, 0.95


@dataclass(frozen=True)
class Task:
    """What is to be done to every layer."""

    smooth: tuple[AWQMapping, ...]  # empty without AWQ
    gptq: bool
    dampening: float
    sample_every: int  # of the tokens, for H; 1 = all
    ranks: Ranks
    clip: bool = False


@dataclass(frozen=True)
class Flow:
    """The calibration data on its way through one layer; `after` is None behind the last one."""

    before: HiddenStates
    after: HiddenStates | None
    batches: tuple[Batch, ...]
    calls: Callable[[int, int], Calls]


@dataclass
class Done:
    """What became of a layer."""

    tensors: Tensors = field(default_factory=dict)
    smoothed: list[dict[str, Any]] = field(default_factory=list)
    clipped: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    unvisited: list[str] = field(default_factory=list)  # no calibration token reached them
    not_factorised: list[str] = field(default_factory=list)  # GPTQ rounded them to nearest


class Layer:
    """A layer filled with its weights. `schemes` is by name within the layer."""

    def __init__(
        self,
        index: int,
        prefix: str,
        module: torch.nn.Module,
        schemes: dict[str, QuantizationScheme],
    ) -> None:
        self.index, self.prefix, self.module, self.schemes = index, prefix, module, schemes
        self.linears = [name for name, scheme in schemes.items() if scheme.weights is not None]
        self.cache_hooks = nearest.prepare(module, schemes)

    def modules(self, names: Iterable[str]) -> list[torch.nn.Module]:
        """Submodules by name."""
        return [self.module.get_submodule(name) for name in names]


def quantize_layer(layer: Layer, task: Task, flow: Flow | None, advance: Advance) -> Done:
    """Everything that is to be done to one layer; without `flow`, no data is needed.

    Without GPTQ the next layer gets this one's outputs before rounding, in the same pass that
    watches; with GPTQ it gets those of the rounded weights, in a second pass. So does `oneshot`.
    """
    done = Done()
    if flow is None:
        nearest.round_weights(layer.modules(layer.linears))
    else:
        mappings = awq.mappings(layer.module, list(task.smooth), layer.schemes)
        watch = _watched(layer, mappings, task, flow, advance)
        advance(WATCHED)
        probe = _probe(layer, mappings, flow)
        for mapping in mappings:
            _smooth(layer, mapping, watch, probe, task.ranks, done)
        advance(SEARCHED)
        _record(layer, watch, task.ranks, done)
        if task.clip:
            _clip(layer, watch, task.ranks, done)
        if task.gptq:
            _round_by_gptq(layer, watch, task, done)
            advance(ROUNDED)
            if flow.after is not None:
                _run(layer, flow, task.ranks, flow.after, None, lambda share: None)
        else:
            nearest.round_weights(layer.modules(layer.linears))
        update_qparams(layer.modules(layer.schemes), ACTIVATIONS)
        _fill_unvisited(layer, done.unvisited)
    advance(HANDED_ON)
    for module in layer.modules(layer.schemes):
        nearest.pack(module)
    done.tensors = {
        layer.prefix + name: tensor.detach() for name, tensor in layer.module.state_dict().items()
    }
    return done


def _watched(
    layer: Layer, mappings: list[awq.Mapping], task: Task, flow: Flow, advance: Advance
) -> Watch:
    """One pass over the calibration data; statistics are summed over the ranks."""
    means = [mapping.balance[0] for mapping in mappings]
    watch = Watch(layer.module, layer.linears, means, task.sample_every, _observe_input)
    onward = None if task.gptq else flow.after
    with watch.hooked(stop_early=onward is None):
        _run(layer, flow, task.ranks, onward, watch, lambda share: advance(share * WATCHED))
    for hook in layer.cache_hooks:
        hook.remove()
    for inputs in watch.inputs.values():
        counts = torch.tensor([inputs.tokens, inputs.sampled], device=inputs.gram.device)
        task.ranks.add_up([inputs.gram, inputs.absolute, counts])
        inputs.tokens, inputs.sampled = (int(count) for count in counts)
        inputs.complete()
    for module in layer.modules(layer.schemes):
        for base in ACTIVATIONS:
            _extend(getattr(module, f"{base}_observer", None), task.ranks)
    return watch


def _extend(observer: Any, ranks: Ranks) -> None:
    """Give an activation observer the range that all ranks saw; some may have seen nothing."""
    if observer is None or ranks.size == 1:
        return
    lowest = getattr(observer, "min_vals", torch.full((1,), torch.inf, device=ranks.device))
    highest = getattr(observer, "max_vals", torch.full((1,), -torch.inf, device=ranks.device))
    lowest, highest = lowest.float().contiguous(), highest.float().contiguous()
    ranks.extend([lowest], [highest])
    if bool((lowest <= highest).all()):
        observer.min_vals, observer.max_vals = lowest.to(DTYPE), highest.to(DTYPE)


def _observe_input(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Static activation scales: what upstream's observer makes of every input."""
    observer = getattr(module, "input_observer", None)
    if observer is not None:
        observer(x)


def _fill_unvisited(layer: Layer, unvisited: list[str]) -> None:
    """Static input scales of experts that no token reached: the largest of their siblings'.

    They saw no input to take a range from; servers use the largest of a layer's experts for all.
    """
    named = {layer.prefix + name: layer.module.get_submodule(name) for name in layer.linears}
    for name in unvisited:
        scale = getattr(named[name], "input_scale", None)
        if scale is None:
            continue
        siblings = [
            module.input_scale
            for other, module in named.items()
            if other not in unvisited
            and other.rpartition(".")[2] == name.rpartition(".")[2]
            and hasattr(module, "input_scale")
        ]
        scale.data.copy_(torch.stack(siblings).amax(dim=0) if siblings else torch.ones_like(scale))


def _run(
    layer: Layer,
    flow: Flow,
    ranks: Ranks,
    after: HiddenStates | None,
    watch: Watch | None,
    advance: Advance,
) -> None:
    """Send the rank's batches through the layer; outputs go to `after` if it is given."""
    batches = ranks.share(flow.batches)
    with ExitStack() as stack:
        write = stack.enter_context(after.writing()) if after is not None else None
        for number, (batch, states) in enumerate(flow.before.read_ahead(batches), 1):
            arguments = flow.calls(batch.count, batch.length)[layer.index]
            try:
                output = layer.module(states, **arguments)
            except LayerEnds:
                output = None
            if write is not None:
                write(batch, output[0] if isinstance(output, tuple) else output)
            if watch is not None:
                watch.end_of_pass()
            advance(number / len(batches))
    if after is not None:
        ranks.wait()
        if ranks.first:
            after.finish()
        ranks.wait()


def _probe(layer: Layer, mappings: list[awq.Mapping], flow: Flow) -> Probe | None:
    """The first sequences through the layer; the same ones on every rank."""
    parents = [parent_of(mapping.balance) for mapping in mappings if len(mapping.balance) > 1]
    if not parents:
        return None
    # How large batches are depends on the number of ranks; what is probed must not.
    batch = flow.batches[0]
    alike = sum(other.count for other in flow.batches if other.length == batch.length)
    count = min(alike, -(-PROBE_TOKENS // batch.length))
    with flow.before.reading() as read:
        states = read(Batch(batch.start, count, batch.length))
    keywords = flow.calls(count, batch.length)[layer.index]
    return Probe(layer.module, states, keywords, parents)


def _smooth(
    layer: Layer,
    mapping: awq.Mapping,
    watch: Watch,
    probe: Probe | None,
    ranks: Ranks,
    done: Done,
) -> None:
    found = awq.search(layer.module, mapping, watch, probe)
    if found is None:
        return
    ranks.broadcast(found.scales, 0)
    awq.apply(layer.module, found, watch)
    done.smoothed.append(
        {
            "smooth": layer.prefix + mapping.smooth,
            "balance": [layer.prefix + name for name in mapping.balance],
            "ratio": found.ratio,
            "loss_before": found.loss_before,
            "loss": found.loss,
        }
    )


def _clip(layer: Layer, watch: Watch, ranks: Ranks, done: Done) -> None:
    """Narrow the ranges of the linears' groups; each rank does some, then all hand theirs round."""
    work = []
    for name in layer.linears:
        inputs, module = watch.of(name), layer.module.get_submodule(name)
        if (
            inputs is not None
            and inputs.sampled
            and clip.applies(name, layer.schemes[name].weights)
        ):
            work.append((name, module, inputs))
    owners = _dealt([module.weight.numel() for _, module, _ in work], ranks.size)
    for (name, module, inputs), owner in zip(work, owners, strict=True):
        figures = torch.zeros(3, device=ranks.device)
        if owner == ranks.rank:
            found = clip.clip(module.weight.data, inputs, layer.schemes[name].weights)
            figures += torch.tensor([found.loss_before, found.loss, found.share]).to(figures)
        ranks.add_up([figures])
        ranks.broadcast(module.weight.data, owner)
        before, loss, share = figures.tolist()
        done.clipped.append(
            {
                "module": layer.prefix + name,
                "groups": share,
                "loss_before": before,
                "loss": loss,
            }
        )


def _record(layer: Layer, watch: Watch, ranks: Ranks, done: Done) -> None:
    """Sensitivities, and the linears that the calibration data never reached."""
    for name in layer.linears:
        inputs = watch.of(name)
        full_name = layer.prefix + name
        if inputs is None or not inputs.sampled:
            done.unvisited.append(full_name)
        elif ranks.first:
            module = layer.module.get_submodule(name)
            record = sensitivity.record(full_name, layer.index, module, inputs)
            if record is not None:
                done.sensitivity.append(record)


@dataclass(frozen=True)
class _Stack:
    """Linears that are quantized as one matrix: the same input, the same arguments."""

    names: list[str]
    members: list[torch.nn.Module]
    inputs: Inputs

    @property
    def cost(self) -> int:
        """What the work is roughly proportional to: the column loop and the factorisation."""
        rows = sum(len(module.weight) for module in self.members)
        return self.inputs.columns**2 * (rows + self.inputs.columns // 3)


def _stacks(layer: Layer, watch: Watch, unvisited: Iterable[str]) -> list[_Stack]:
    left_out = set(unvisited)
    stacks: dict[tuple[int, str], _Stack] = {}
    for name in layer.linears:
        inputs = watch.of(name)
        if inputs is None or layer.prefix + name in left_out:
            continue
        key = (id(inputs), layer.schemes[name].model_dump_json(exclude={"targets"}))
        stack = stacks.setdefault(key, _Stack([], [], inputs))
        stack.names.append(name)
        stack.members.append(layer.module.get_submodule(name))
    return sorted(stacks.values(), key=lambda stack: -stack.cost)


def _round_by_gptq(layer: Layer, watch: Watch, task: Task, done: Done) -> None:
    """Round every linear; each rank does some of the stacks, then all hand theirs round."""
    modules = {name: layer.module.get_submodule(name) for name in layer.linears}
    observe(modules.values(), "weight")
    found = {name: module.weight_observer.get_qparams() for name, module in modules.items()}
    for name, module in modules.items():
        _store(module, found[name])
    stacks = _stacks(layer, watch, done.unvisited)
    owners = _dealt([stack.cost for stack in stacks], task.ranks.size)
    fell_back = torch.zeros(len(stacks), dtype=torch.int32, device=task.ranks.device)
    for number, stack in enumerate(stacks):
        if owners[number] == task.ranks.rank:
            fell_back[number] = int(_round_stack(stack, found, task.dampening))
    task.ranks.add_up([fell_back])
    for number, stack in enumerate(stacks):
        for module in stack.members:
            task.ranks.broadcast(module.weight.data, owners[number])
        if fell_back[number]:
            done.not_factorised += [layer.prefix + name for name in stack.names]


def _dealt(costs: list[int], ranks: int) -> list[int]:
    """Which rank does which item: each goes to the one with the least to do so far."""
    load = [0] * ranks
    owners = []
    for cost in costs:
        owner = load.index(min(load))
        load[owner] += cost
        owners.append(owner)
    return owners


def _round_stack(stack: _Stack, found: dict[str, Any], dampening: float) -> bool:
    members = stack.members
    scheme = members[0].quantization_scheme
    grids = [
        gptq.Grid.of(
            module.weight.shape,
            found[name]["scale"],
            found[name]["zero_point"],
            found[name]["global_scale"],
            scheme.weights,
        )
        for name, module in zip(stack.names, members, strict=True)
    ]
    weight = torch.cat([module.weight.float() for module in members])
    # A kernel for quantized weights alone multiplies in BF16; one for 8-bit activations, too,
    # multiplies by the scale behind the sum.
    multiplied_in = DTYPE if scheme.input_activations is None else torch.float32
    rounded, fell_back = gptq.quantize(
        weight, stack.inputs.gram, gptq.stack(grids), scheme.weights, dampening, multiplied_in
    )
    heights = [len(module.weight) for module in members]
    for module, part in zip(members, rounded.split(heights), strict=True):
        module.weight.copy_(part)
    return fell_back


def _store(module: torch.nn.Module, found: dict[str, torch.Tensor | None]) -> None:
    """Scales into the module's parameters, in the types that they are stored in."""
    for name, value in found.items():
        target = getattr(module, f"weight_{name}", None)
        if value is not None and target is not None:
            target.data.copy_(value.reshape(target.shape))
