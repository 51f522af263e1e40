"""Does every tensor of the artifact split over the GPUs that it is to be served on? Shapes alone.

vLLM gives each of `size` GPUs an equal share of a linear: of its inputs where the layer adds up the
results (ROW_PARALLEL), of its outputs elsewhere. Packed weights, scales and zero points are cut at
the same places, so each must have a whole part there (`compressed_tensors_wNa16.py`). Key and
value heads are repeated where there are more GPUs than heads. What is no matter of the checkpoint:
the vocabulary, which vLLM pads to a multiple of 64, and tiles of the Marlin kernel (64 outputs by
128 inputs), to which vLLM 0.32 pads each share (`kernels/linear/mixed_precision/marlin.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from quantize.artifact_formats import FORMATS, ArtifactFormat
from quantize.checkpoint import LAYER, Checkpoint
from quantize.findings import Finding
from quantize.formats import BLOCK, Rule, WeightFormat
from quantize.modules import module_name, served_unit
from quantize.tensors import TensorInfo

ROW_PARALLEL = re.compile(r"\.(o_proj|out_proj|down_proj|c_proj|dense|dense_4h_to_h|fc2|w2|wo)$")
"""Linears whose input is split over the ranks of tensor parallelism; others split their output."""

KEY_VALUE = (".k_proj", ".v_proj")
COMPRESSED_TENSORS = FORMATS["compressed-tensors"]

CPU_TILE = 32
"""Inputs and outputs of a 4-bit linear in vLLM's CPU kernel (`mixed_precision/cpu.py`)."""

Chosen = Sequence[tuple[TensorInfo, Rule]]


def check_tensor_parallel(
    checkpoint: Checkpoint,
    chosen: Chosen,
    size: int,
    stored: ArtifactFormat = COMPRESSED_TENSORS,
) -> list[Finding]:
    """One finding for a size that some tensor does not split over."""
    faults = parallel_faults(checkpoint, chosen, size, stored)
    if not faults:
        return []
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return [
        Finding(
            f"tensor parallel size {size} does not split {'; '.join(faults[:3])}{more}",
            f"remove {size} from serve.tensor_parallel_sizes, or take a smaller group size",
        )
    ]


def parallel_faults(
    checkpoint: Checkpoint,
    chosen: Chosen,
    size: int,
    stored: ArtifactFormat = COMPRESSED_TENSORS,
) -> list[str]:
    """What does not split evenly over `size` GPUs: heads, inputs, outputs, packed tensors."""
    if size == 1:
        return []
    faults = []
    heads = checkpoint.dimension("num_attention_heads")
    if heads is not None and heads % size:
        faults.append(f"{heads} attention heads")
    kv_heads = checkpoint.dimension("num_key_value_heads")
    if kv_heads is not None and kv_heads % size and size % kv_heads:
        faults.append(f"{kv_heads} key-value heads")
    for info, rule in chosen:
        if LAYER.search(info.name):
            whole = _linear_fault(info, rule.form, size)
            faults += [whole] if whole else _packed_faults(info, rule.form, size, kv_heads, stored)
    return faults


def _linear_fault(info: TensorInfo, form: WeightFormat, size: int) -> str | None:
    """Inputs or outputs that do not make equal shares of whole groups or blocks."""
    module = module_name(info.name)
    block = BLOCK if form.strategy == "block" else 1
    if ROW_PARALLEL.search(module):
        unit = form.group_size or block
        if info.shape[1] % (size * unit):
            what = f"{unit} inputs each" if unit > 1 else "one input each"
            return f"{module} with {info.shape[1]} inputs (shares of {what})"
    elif not module.endswith(KEY_VALUE) and info.shape[0] % (size * block):
        return f"{module} with {info.shape[0]} outputs"
    return None


def share(info: TensorInfo, size: int, kv_heads: int | None) -> tuple[int, int]:
    """Outputs and inputs of one GPU's part of a linear that splits."""
    rows, columns = info.shape
    module = module_name(info.name)
    if ROW_PARALLEL.search(module):
        return rows, columns // size
    if module.endswith(KEY_VALUE) and kv_heads is not None and 0 < kv_heads < size:
        return rows // kv_heads, columns  # the head is repeated
    return rows // size, columns


def _packed_faults(
    info: TensorInfo, form: WeightFormat, size: int, kv_heads: int | None, stored: ArtifactFormat
) -> Iterator[str]:
    """Packed tensors, scales and zero points of which a GPU's share is no whole number of words.

    A share must be stored as a linear of its shape would be: `pieces` of them make the whole.
    """
    part = share(info, size, kv_heads)
    if 0 in part:
        yield f"{module_name(info.name)} {list(info.shape)} (nothing is left for a GPU)"
        return
    axis = 0 if part[0] != info.shape[0] else 1
    pieces = info.shape[axis] // part[axis]
    whole, parts = stored.layout(form, info.shape, "BF16"), stored.layout(form, part, "BF16")
    along = 1 - axis if stored.TRANSPOSED else axis
    for name in stored.SPLIT:
        if name not in whole:
            continue
        shape, mine = whole[name][1], parts[name][1]
        repeated = len(shape) < 2 or (axis == 1 and form.strategy == "channel")
        if name != stored.SPLIT[0] and repeated:
            continue  # every GPU has all of it
        if shape[along] != pieces * mine[along]:
            where = ("outputs", "inputs")[axis]
            yield (
                f"{module_name(info.name)}.{name} {list(shape)}: {part[axis]} {where} for each GPU "
                f"are no whole number of its entries along dimension {along}"
            )


def cpu_kernel_findings(checkpoint: Checkpoint, chosen: Chosen, size: int) -> list[Finding]:
    """4-bit linears that vLLM has no kernel for on a CPU: shares must be multiples of 32."""
    kv_heads = checkpoint.dimension("num_key_value_heads")
    outputs: dict[str, int] = {}
    odd: list[str] = []
    for info, rule in chosen:
        form = rule.form
        if form.compression != "pack-quantized" or form.bits != 4 or not LAYER.search(info.name):
            continue
        rows, columns = share(info, size, kv_heads)
        unit = served_unit(module_name(info.name))
        outputs[unit] = outputs.get(unit, 0) + rows
        if columns % CPU_TILE:
            odd.append(f"{module_name(info.name)} with {columns} inputs")
    odd += [f"{unit} with {rows} outputs" for unit, rows in outputs.items() if rows % CPU_TILE]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if odd[1:] else ""
    return [
        Finding(
            f"vLLM's CPU kernel for 4-bit weights takes multiples of {CPU_TILE}, unlike {odd[0]}"
            f"{more}",
            "measure on a GPU, or add these modules to quantize.ignore",
        )
    ]
