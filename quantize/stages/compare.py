"""compare: what quantization cost, from the `measure` artifacts; the recipe's verdicts and gates.

A gate that fails is recorded, not raised: the card is still written, and the executor ends the run
with exit code 7 when :func:`failed_gates` names any. The arithmetic needs scipy, which a plan must
not pay for: it is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.evaluation import Evaluate, GateRules, Margins
from quantize.protocol import write_json
from quantize.records import CompareRecord

if TYPE_CHECKING:
    from quantize.report.paired.verdicts import Rules
    from quantize.stages.base import Resolved, StageContext

VERSION = 3


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: this stage only calculates."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """Margins and gate, and the bits that the default margins go by; the rest is in the inputs."""
    evaluate = resolved.recipe.evaluate
    return {
        "margins": (evaluate.margins if evaluate else Margins()).model_dump(mode="json"),
        "gate": (evaluate.gate if evaluate else GateRules()).model_dump(mode="json"),
        "bits": resolved.recipe.quantize.weight_bits,
    }


def run(context: StageContext) -> None:
    """Write `record.json` (:class:`quantize.records.CompareRecord`) and `details.json`."""
    from quantize.report.paired.comparing import compare

    inputs = context.inputs
    record, details = compare(
        inputs["baseline"],
        inputs["candidate"],
        rules(context.resolved),
        repeat=inputs.get("repeat"),
        base=inputs.get("base"),
        calibrate=inputs.get("calibrate"),
    )
    write_json(context.files / "record.json", record)
    write_json(context.files / "details.json", details)


def rules(resolved: Resolved) -> Rules:
    """The recipe's margins and gate."""
    from quantize.report.paired.verdicts import Rules

    evaluate: Evaluate | None = resolved.recipe.evaluate
    return Rules(
        margins=evaluate.margins if evaluate else Margins(),
        gate=evaluate.gate if evaluate else GateRules(),
        bits=resolved.recipe.quantize.weight_bits,
    )


def failed_gates(record: CompareRecord) -> list[str]:
    """One sentence for each gate that the candidate fails."""
    return [gate["says"] for gate in record["gates"] if not gate["passed"]]
