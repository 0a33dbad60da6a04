"""Which number format the weights are loaded in. `checkpoint` is the format they were saved in, None if unknown."""

from typing import TYPE_CHECKING

from luthier.core.machine import Machine

if TYPE_CHECKING:
    import torch


def training_dtype(
    *, bf16: bool, fp16: bool, pure_bf16: bool, checkpoint: "torch.dtype | None", machine: Machine
) -> "torch.dtype":
    """What the user asked for; otherwise float32 on a CPU, and elsewhere what inference would take."""
    import torch

    if bf16 or pure_bf16:
        return torch.bfloat16
    if fp16:
        return torch.float16
    return torch.float32 if machine.device == "cpu" else inference_dtype("auto", checkpoint=checkpoint, machine=machine)


def inference_dtype(infer_dtype: str, *, checkpoint: "torch.dtype | None", machine: Machine) -> "torch.dtype":
    """`infer_dtype`: `float32`, `float16`, `bfloat16`, or `auto`.

    `auto` keeps the 16-bit format of the checkpoint where the machine computes it; otherwise it is a 16-bit format on
    an accelerator and float32 on a CPU.
    """
    import torch

    if infer_dtype != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[infer_dtype]
    if checkpoint == torch.bfloat16 and machine.bf16:
        return torch.bfloat16
    if checkpoint == torch.float16 and machine.fp16:
        return torch.float16
    if machine.device == "cpu":
        return torch.float32
    return torch.bfloat16 if machine.bf16 else torch.float16
