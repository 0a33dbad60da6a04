"""PiSSA: LoRA that starts from the principal part of a weight instead of from zero (https://arxiv.org/abs/2404.02948).

With the singular value decomposition W = U S V^T and its first r parts, A = S^1/2 V^T and B = U S^1/2, both divided by
the square root of LoRA's scale s; what the layer keeps is the rest, W - s B A (equations 2 to 4).

The rest is not saved. A saved PiSSA adapter would need it, so what is saved is the plain LoRA adapter of rank 2 r that
does the same to W, with A_0 and B_0 for the start: W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]. From it
both pairs can be read back, so training resumes from it, and anything that loads LoRA loads it.

Shapes: W (out, in), A (r, in), B (out, r).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from luthier.core.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

START_A, START_B = "pissa_start_A", "pissa_start_B"
"""Buffers beside the factors of a layer, which keep what these were at the start."""
NAME = "default"
"""What peft calls the adapter."""


def start_from_principal_parts(adapted: "PeftModel", iterations: int) -> None:
    """Set A and B of every layer, and take their product out of its weight.

    `iterations` of the fast decomposition (https://arxiv.org/abs/0909.4061), or -1 for the exact one. Where the rank is
    larger than a side of the weight, such as that of a gate with one output, the rest of A and B starts as in LoRA.
    """
    import torch

    for _, layer in _layers(adapted):
        weight = _matrix(layer).float()
        rank, scale = layer.r[NAME], layer.scaling[NAME]
        num_parts = min(rank, *weight.shape)
        if iterations == -1:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            left, values, right = torch.svd_lowrank(weight, num_parts, niter=iterations)
            right = right.T
        roots = (values[:num_parts] / scale).sqrt()
        factor = layer.lora_A[NAME].weight
        with torch.no_grad():
            factor[:num_parts] = (roots[:, None] * right[:num_parts]).to(factor.dtype)
            layer.lora_B[NAME].weight[:, :num_parts] = (left[:, :num_parts] * roots).to(factor.dtype)
        layer.register_buffer(START_A, factor.detach().clone(), persistent=False)
        layer.register_buffer(START_B, layer.lora_B[NAME].weight.detach().clone(), persistent=False)
        _set_matrix(layer, weight - _product(layer, *_start(layer)))


def is_pissa(model: "nn.Module") -> "TypeGuard[PeftModel]":
    return any(name.endswith(START_A) for name, _ in model.named_buffers())


def save_as_lora(adapted: "PeftModel", folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """The adapter of rank 2 r on the original model, into `folder`. `state`: the model's, if it was gathered."""
    import copy

    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapted.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    tensors = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    for name, layer in _layers(adapted):
        start_a, start_b = (start.cpu() for start in _start(layer))
        for key, start, dim in ((f"{name}.lora_A.weight", start_a, 0), (f"{name}.lora_B.weight", -start_b, 1)):
            tensors[key] = torch.cat([tensors[key].cpu(), start.to(tensors[key].dtype)], dim=dim)
        scale, rank = layer.scaling[NAME], layer.r[NAME]
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensors[key] = tensor.cpu().contiguous()
        if tensors[key].data_ptr() in seen:  # both ends of a tied model; a file holds no tensor under two names
            tensors[key] = tensors[key].clone()
        seen.add(tensors[key].data_ptr())
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.deepcopy(adapted.peft_config[NAME])
    settings.inference_mode = True
    settings.r, settings.lora_alpha, settings.use_rslora = 2 * rank, scale * 2 * rank, False  # type: ignore[attr-defined]
    settings.save_pretrained(str(folder))


def resume_pissa(adapted: "PeftModel", folder: Path) -> None:
    """Read both pairs of factors from what `save_as_lora` wrote; the weights keep the rest that belongs to them."""
    import torch
    from peft import set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    tensors = load_peft_weights(str(folder), device="cpu")
    with torch.no_grad():
        for name, layer in _layers(adapted):
            rank = layer.r[NAME]
            both_a, both_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            if both_a.shape[0] != 2 * rank:
                raise ValueError(f"size mismatch for {name}: rank {both_a.shape[0]} instead of {2 * rank}")
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = both_a[:rank], both_b[:, :rank]
            here = _start(layer)
            found = both_a[rank:].to(here[0].device), -both_b[:, rank:].to(here[0].device)
            if not all(map(torch.equal, found, here)):  # another machine, whose decomposition has other last digits
                _set_matrix(layer, _matrix(layer).float() + _product(layer, *here) - _product(layer, *found))
                for kept, value in zip(here, found, strict=True):
                    kept.copy_(value)
    set_peft_model_state_dict(adapted, tensors)


def _layers(adapted: "PeftModel") -> Iterator[tuple[str, Any]]:
    """Name in the adapter's file, and the layer of peft. Raises `ModelError` for one that is not a plain linear one."""
    from peft.tuners.lora import Linear, LoraLayer

    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            if type(layer) is not Linear:
                raise ModelError(
                    f"pissa_init: {name} is not a linear layer -> name linear layers in lora_target, or all"
                )
            yield name, layer


def _start(layer: Any) -> "tuple[Tensor, Tensor]":
    return layer.get_buffer(START_A), layer.get_buffer(START_B)


def _product(layer: Any, a: "Tensor", b: "Tensor") -> "Tensor":
    """s B A in float32."""
    product: Tensor = layer.scaling[NAME] * (b.float() @ a.float())
    return product


def _matrix(layer: Any) -> "Tensor":
    """(out, in), however the layer stores it."""
    weight: Tensor = layer.get_base_layer().weight.data
    return weight.T if layer.fan_in_fan_out else weight


def _set_matrix(layer: Any, matrix: "Tensor") -> None:
    weight = layer.get_base_layer().weight
    weight.data = (matrix.T if layer.fan_in_fan_out else matrix).to(weight.dtype).contiguous()
