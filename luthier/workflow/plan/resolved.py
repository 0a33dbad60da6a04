"""What each `auto`, and each key left out that depends on machine or model, becomes in a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier.core.files import size
from luthier.core.machine import Machine
from luthier.workflow.plan.recompute import Recompute

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.workflow.plan.shape import Shape


def resolved(run: "TrainRun", shape: "Shape", recompute: Recompute, machine: Machine) -> Mapping[str, str]:
    """Key -> value and reason."""
    attention = shape.attention.implementation
    reason = shape.attention.reason or f"the best that {machine.device} and model have"
    template = run.data.template
    layout = f"padded: {shape.padding_reason}" if shape.padding_reason else "concatenated without padding"
    format_reason = (
        "as the keys say" if run.training["bf16"] or run.training["fp16"] else f"default on {machine.device}"
    )
    found = {
        "device": f"{machine.device}, {machine.num_cpus} CPUs" if not machine.is_assumed else _assumed(machine),
        "dtype": f"{str(shape.dtype).removeprefix('torch.')} ({format_reason})",
        "flash_attn": f"{attention} ({reason})",
        "template": "the model's own chat template" if template in (None, "auto") else str(template),
        "rows": layout,
        "gradient_checkpointing": str(recompute),
    }
    if "lora_target" in type(run.adapter).__dataclass_fields__ and "all" in run.adapter.lora_target:
        adapted = {
            name.partition(".lora_")[0].rpartition(".")[2]
            for name, _ in shape.model.named_parameters()
            if ".lora_" in name
        }
        found["lora_target"] = ", ".join(sorted(adapted))
    return found


def _assumed(machine: Machine) -> str:
    return f"an accelerator with {size(machine.device_memory_bytes)} for each process, which is assumed"
