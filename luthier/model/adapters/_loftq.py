"""LoftQ: LoRA that starts by compensating the error of quantization (https://arxiv.org/abs/2310.08659).

With Q the quantized weight, s B A is the best product of rank r for W - Q: algorithm 1 with one round, so Q is what any
program makes of W, and the adapter can be loaded on it anywhere. It belongs to Q and not to W, so how Q was made stands
in a file beside it, and it is put on nothing else.

Shapes: W, Q (out, in), A (r, in), B (out, r).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.quantization import LOFTQ_FILE
from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.model.compat.bitsandbytes_cpu import prevent_repacking
from luthier.model.quantization._layers import (
    FORMATS,
    Quantization,
    as_linear,
    computed_weight,
    describe,
    description_of,
    is_quantized_linear,
    keys_in,
    layers_to_quantize,
    set_description,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

NUM_ITERATIONS = 16
"""Of the fast decomposition (https://arxiv.org/abs/0909.4061)."""


def start_from_quantization_error(adapted: "PeftModel", original: "PreTrainedModel") -> None:
    """Set A and B of every quantized layer; `original` is the model with its weights as they were."""
    import torch
    from peft.tuners.lora import LoraLayer

    before = after = 0.0
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or not is_quantized_linear(module.get_base_layer()):
            continue
        layer: Any = module
        factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight: Tensor = original.get_parameter(f"{name}.weight").detach()
        lost = weight.float().to(factor_a.device) - computed_weight(layer.get_base_layer())
        rank = layer.r["default"]
        left, values, right = torch.svd_lowrank(lost, min(rank, *lost.shape), niter=NUM_ITERATIONS)
        roots = (values / layer.scaling["default"]).sqrt()
        with torch.no_grad():
            factor_a[: len(roots)] = (roots[:, None] * right.T).to(factor_a.dtype)
            factor_b[:, : len(roots)] = (left * roots).to(factor_b.dtype)
            left_over = lost - layer.scaling["default"] * (factor_b.float() @ factor_a.float())
        before, after = before + float(lost.square().sum()), after + float(left_over.square().sum())
    vars(adapted)[_RECORD] = description_of(adapted.get_base_model())
    share = 1 - (after / before) ** 0.5 if before else 0.0
    info(f"loftq_init: the adapter starts by compensating {share:.1%} of the error of quantization")


_RECORD = "base_of_loftq"
"""The attribute of a model with such an adapter that holds how its base was quantized."""


def save_record(adapted: "PeftModel", folder: Path) -> None:
    """Beside an adapter that belongs to a quantized base: how that was made."""
    if (record := vars(adapted).get(_RECORD)) is not None:
        (folder / LOFTQ_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """How the base of the adapter in `folder` was quantized, if it was trained with `loftq_init`.

    Raises `ModelError` if that cannot be read.
    """
    file = folder / LOFTQ_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        keys_in(record)
        if not all(record[key] in ("float32", "float16", "bfloat16") for key in FORMATS):
            raise ValueError(f"{' and '.join(FORMATS)} must be number formats")
    except (ValueError, AttributeError, KeyError, TypeError) as fault:
        raise ModelError(f"{file}: cannot be read ({fault!r}) -> copy or download the adapter again") from fault
    return record


def require_base(adapted: "PeftModel", base: "PreTrainedModel", name: str, folder: Path) -> None:
    """The base is that of the adapter, packed or as plain weights. Raises `ModelError` if it is another."""
    record = read_record(folder)
    if record is None:
        return
    here = description_of(base)
    if here is None or keys_in(here) != keys_in(record):
        words = ", ".join(f"{key}: {value}" for key, value in keys_in(record).items()).replace("True", "true")
        raise ModelError(
            f"adapter_name_or_path: {name}: was trained with loftq_init, so it compensates the error of quantized"
            f" weights ({words}), and is wrong on others -> give these keys, and this adapter first; `luthier export`"
            " with them merges it into the weights as quantized"
        )
    vars(adapted)[_RECORD] = record


def round_weights(model: "PreTrainedModel", how: "Quantization | None", record: dict[str, Any]) -> None:
    """Give each layer of a plain model the weight that it computes with when quantized as `record` says.

    `how`: the quantization that the run asks for; nothing is done if it is another, which `require_base` then tells.
    Layer by layer, in the number format of the model. Raises `ModelError` if the method only quantizes while reading.
    """
    import torch

    read_in, computed_in = (getattr(torch, record[key]) for key in FORMATS)
    if how is None or keys_in(describe(how.keys, read_in, computed_in)) != keys_in(record):
        return
    quantize = how.quantizer.linear
    if quantize is None:
        raise ModelError(
            f"quantization_method: {how.quantizer.name}: its weights cannot be turned back into plain ones, so"
            " this adapter cannot be merged -> use model and adapter side by side"
        )
    for name in layers_to_quantize(model):
        weight = as_linear(model.get_submodule(name)).weight.detach()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight.to(read_in), requires_grad=False)
        quantized = quantize(plain, how.keys, computed_in, torch.device(how.device))
        if quantized is not None:
            kept: Any = model.get_submodule(name)
            prevent_repacking(quantized)
            rounded = computed_weight(quantized, computed_in)
            kept.weight.data.copy_(rounded if isinstance(kept, torch.nn.Linear) else rounded.T)
    set_description(model, describe(how.keys, read_in, computed_in))
    info("loftq_init: the adapter belongs to quantized weights, and is merged into what quantizing makes of them")
