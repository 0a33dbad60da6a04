"""Number formats: what the weights are loaded in, and which of them are float32 beside 16-bit ones.

`checkpoint` is the format the weights were saved in, None if unknown.
"""

from typing import TYPE_CHECKING

from luthier.core.log import warn
from luthier.core.machine import Machine

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def training_dtype(*, bf16: bool, fp16: bool, pure_bf16: bool) -> "torch.dtype":
    """What the user asked for, otherwise float32 whatever the checkpoint: only autocast, which `bf16` and `fp16` turn
    on, computes with 16-bit weights beside trained ones in float32."""
    import torch

    if bf16 or pure_bf16:
        return torch.bfloat16
    return torch.float16 if fp16 else torch.float32


def warn_slow_format(dtype: "torch.dtype", machine: Machine) -> None:
    """Warn where bfloat16 takes longer than float32, as on a CPU without instructions for it."""
    import torch

    if dtype == torch.bfloat16 and machine.device == "cpu" and not machine.bf16:
        warn(
            "bf16: this processor has no instructions for bfloat16, so each product turns its numbers into float32"
            " -> leave bf16 out unless the memory is needed"
        )


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


def autocast_of_training(model: "nn.Module", half: "torch.dtype | None" = None) -> "torch.autocast":
    """The autocast of training, for a forward pass of the model outside the trainer.

    Norms, adapters or whole layers may be float32 in a 16-bit model, which only computes under autocast then.
    `half`: the format, where it is known; else that of the 16-bit weights.
    """
    import torch

    half, device = half or half_of(model), next(model.parameters()).device.type
    return torch.autocast(device, dtype=half, enabled=half is not None)


def computed_in(x: "Tensor") -> "torch.dtype":
    """The format that a matrix product with `x` is computed in here: that of autocast, or its own."""
    import torch

    # Tensors without data, of a plan, have no autocast of their own.
    device = "cpu" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def half_of(model: "nn.Module") -> "torch.dtype | None":
    """The 16-bit format that some weights have, and that the model therefore computes in."""
    import torch

    halves = (weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16))
    return next(halves, None)


def upcast_trainable(model: "nn.Module") -> None:
    """Trainable parameters are float32: a small step would vanish in the 8 bits of a bfloat16 mantissa.

    What they compute is float32 too. On a CPU, LayerNorm takes that only if its own weights are float32.
    """
    import torch

    norms = [
        weight
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for weight in module.parameters()
        if weight.device.type == "cpu"
    ]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in (*trained, *norms):
        if weight.dtype in (torch.bfloat16, torch.float16):
            _upcast(weight)


def upcast_norms(model: "nn.Module") -> None:
    """`upcast_layernorm`: the weights of normalization layers are float32."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and ("norm" in name or "ln" in name):
            _upcast(weight)


def _upcast(weight: "nn.Parameter") -> None:
    """In place, so tied weights stay tied. `data` of a weight that processes share has no say over their parts."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        torch.utils.swap_tensors(weight, torch.nn.Parameter(weight.detach().float(), weight.requires_grad))
    else:
        weight.data = weight.data.float()


def upcast_head_output(model: "PreTrainedModel") -> None:
    """`upcast_lmhead_output`: the logits are float32 as they leave the output head."""
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: output.float())
