"""Low-bit linear layers: how they are put into a model, how they are recognized, how much memory they take.

Quantized while reading: transformers quantizes tensor after tensor, so the original never is in memory as a whole.
Quantized in memory: layer after layer is replaced, and the original of each is freed, for what transformers cannot
quantize while reading it (GGUF files) or not at all (HQQ).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MissingExtra, ModelError
from luthier.core.importing import is_loaded
from luthier.core.kinds import QUANTIZERS
from luthier.core.log import info, warn
from luthier.core.versions import is_installed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from luthier.config.keys.quantization import QuantizationConfig
    from luthier.core.machine import Machine
    from luthier.model.quantization import Quantizer


def missing_library(keys: "QuantizationConfig") -> tuple[str, str] | None:
    """(module, pip line) of a library that `quantization_method` needs and that is not installed. Imports nothing."""
    quantizer = QUANTIZERS.get(keys.quantization_method)
    missing = [name for name in quantizer.libraries if not is_installed(name)]
    return (missing[0], f"pip install 'luthier[{quantizer.extra}]'") if missing else None


_DESCRIPTION = "quantized_by_luthier"
"""The attribute of a model that holds its `describe`."""
FORMATS = ("weights_read_in", "computed_in")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model is to be quantized on this machine; from `plan`."""

    quantizer: "Quantizer"
    keys: "QuantizationConfig"
    device: str
    """Where the quantized weights lie, e.g. `cuda:1`."""
    sharded: bool = False
    """FSDP or ZeRO-3 will shard the weights."""

    def options(self, dtype: "torch.dtype", checkpoint: "torch.dtype | None", is_gguf: bool) -> dict[str, Any]:
        """For `from_pretrained`. What is quantized in memory is read as it was saved, so it is mapped from the file."""
        if self._while_reading(is_gguf):
            config = self.quantizer.reading(self.keys, dtype, self.sharded)  # type: ignore[misc]
            device_map = "auto" if self.keys.quantization_device_map == "auto" else {"": self.device}
            return {"quantization_config": config, "device_map": device_map}
        return {"dtype": checkpoint or dtype, "device_map": None}

    def finish(self, model: "PreTrainedModel", dtype: "torch.dtype", is_gguf: bool) -> None:
        """On the model as it was read. Raises `ModelError` if the method only quantizes while reading."""
        import torch

        read_in = dtype
        if not self._while_reading(is_gguf):
            quantize = self.quantizer.linear
            if quantize is None:
                raise ModelError(
                    f"quantization_method: {self.quantizer.name}: cannot quantize a GGUF file"
                    " -> give the model as a folder or hub id, or set quantization_method: bnb or hqq"
                )
            device, read_in = torch.device(self.device), model.dtype
            quantize_in_memory(model, lambda layer: quantize(layer, self.keys, dtype, device), dtype, device)
            if self.quantizer.reading is not None:
                mark(model, self.quantizer.reading(self.keys, dtype, self.sharded))
        report(model, self.keys)
        set_description(model, describe(self.keys, read_in, dtype))

    def _while_reading(self, is_gguf: bool) -> bool:
        return self.quantizer.reading is not None and not is_gguf


def plan(keys: "QuantizationConfig", machine: "Machine", *, sharded: bool = False) -> Quantization | None:
    """None if the run does not quantize. Raises `MissingExtra` or `ModelError` if this machine cannot."""
    if keys.quantization_bit is None:
        return None
    quantizer: Quantizer = QUANTIZERS.get(keys.quantization_method)
    if missing := missing_library(keys):
        raise MissingExtra(
            f"quantization_method: {quantizer.name}: needs the library {missing[0]}, which is not installed"
            f" -> {missing[1]}"
        )
    if quantizer.needs_gpu and machine.device != "cuda":
        raise ModelError(
            f"quantization_method: {quantizer.name}: needs an NVIDIA GPU, and this machine has none"
            " -> set quantization_method: bnb or hqq, which run here"
        )
    device = f"{machine.device}:{machine.local_rank}" if machine.num_accelerators else machine.device
    return Quantization(quantizer, keys, device, sharded)


def describe(keys: "QuantizationConfig", read_in: "torch.dtype", computed_in: "torch.dtype") -> dict[str, Any]:
    """What decides the weights of a quantized model: the keys, and the number formats they go through."""
    names = ["quantization_method", "quantization_bit"]
    if (keys.quantization_method, keys.quantization_bit) == ("bnb", 4):
        names += ["quantization_type", "double_quantization"]
    formats = (str(dtype).removeprefix("torch.") for dtype in (read_in, computed_in))
    return {name: getattr(keys, name) for name in names} | dict(zip(FORMATS, formats, strict=True))


def description_of(model: "nn.Module") -> dict[str, Any] | None:
    """`describe` of a model whose weights are exactly those of quantization, packed or not."""
    return vars(model).get(_DESCRIPTION)


def set_description(model: "nn.Module", description: "dict[str, Any]") -> None:
    vars(model)[_DESCRIPTION] = description


def forget_description(model: "nn.Module") -> None:
    """Something was merged into its weights."""
    vars(model).pop(_DESCRIPTION, None)


def keys_in(record: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run that quantize as `record` says."""
    return {key: value for key, value in record.items() if key not in FORMATS}


def quantize_in_memory(
    model: "PreTrainedModel",
    quantize: "Callable[[nn.Linear], nn.Module | None]",
    dtype: "torch.dtype",
    device: "torch.device",
) -> None:
    """Replace the linear layers of `model` one by one; the rest goes to `device` in `dtype`.

    The same layers stay as they are that transformers leaves as they are: the output head, what is tied to the
    embeddings, and what the model wants in float32.
    """
    keep_float32 = list(model._keep_in_fp32_modules or ())
    left_out = []
    for name in layers_to_quantize(model):
        quantized = quantize(as_linear(model.get_submodule(name)))
        if quantized is None:
            left_out.append(name)
        else:
            model.set_submodule(name, quantized.requires_grad_(False))
    if left_out:
        warn(f"{len(left_out)} layers such as {left_out[0]} have shapes that cannot be quantized, and stay as they are")
    done = {id(weight) for _, module in quantized_layers(model) for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) not in done:
            in_float32 = any(word in name.split(".") for word in keep_float32)
            weight.data = weight.data.to(device, weight.dtype if in_float32 else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def layers_to_quantize(model: "PreTrainedModel") -> list[str]:
    """The full names of the plain linear layers that transformers would quantize too."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    wanted = [name for name, module in model.named_modules() if _is_plain(module)]
    return [name for name in wanted if should_convert_module(name, skipped)]


def computed_weight(layer: Any, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """(out, in) in float32: what the layer makes of each unit vector, whatever it holds its weight in.

    `dtype`: of the unit vectors; not given, the number format that it computes in, as far as it says one.
    """
    import torch

    device = next(iter((*layer.parameters(), *layer.buffers()))).device
    dtype = dtype or vars(layer).get("compute_dtype")  # of HQQ and bitsandbytes
    with torch.no_grad():
        weight: torch.Tensor = layer(torch.eye(layer.in_features, device=device, dtype=dtype)).float().T
        return weight if layer.bias is None else weight - layer.bias.float()[:, None]


def mark(model: "PreTrainedModel", config: Any) -> None:
    """Say to transformers, accelerate and peft what they ask a model that transformers has quantized."""
    from transformers.quantizers.auto import AutoHfQuantizer

    marked: Any = model
    marked.is_quantized, marked.quantization_method = True, config.quant_method
    marked.hf_quantizer = AutoHfQuantizer.from_config(config)
    marked.hf_quantizer.postprocess_model(model)


def quantized_layers(model: "nn.Module") -> "Iterator[tuple[str, nn.Module]]":
    """Linear layers whose weight is not a plain matrix, whichever library made them. What peft wraps counts itself."""
    for name, module in model.named_modules():
        if is_quantized_linear(module) and not _is_wrapped(module):
            yield name, module


def _is_wrapped(module: "nn.Module") -> bool:
    """Whether it is a layer of peft."""
    if not is_loaded("peft"):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_quantized(model: "nn.Module") -> bool:
    return any(True for _ in quantized_layers(model))


def is_quantized_linear(module: "nn.Module") -> bool:
    """Told from its form: it has the two sizes of a linear layer, and no matrix of real numbers of this shape."""
    if "in_features" not in vars(module) or "out_features" not in vars(module):
        return False
    weight = module._parameters.get("weight")
    return weight is None or weight.shape != (module.out_features, module.in_features) or not weight.is_floating_point()


def num_weights(module: "nn.Module") -> int:
    """Numbers in the matrix of a linear layer, quantized or not."""
    return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]


def num_layer_bytes(module: "nn.Module") -> int:
    """What a linear layer takes in memory, scales and tables included."""
    import torch

    counted: set[int] = set()

    def add(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            if value.data_ptr() in counted:
                return 0
            counted.add(value.data_ptr())
            return value.numel() * value.element_size() + add(vars(value)) if vars(value) else value.nbytes
        if isinstance(value, dict):
            return sum(map(add, value.values()))
        if type(value).__name__ == "QuantState":  # of bitsandbytes: scales and table of 4 bits, and the nested ones
            return sum(map(add, (value.absmax, value.code, value.offset, value.state2)))
        if type(value).__name__ == "MatmulLtState":  # of bitsandbytes: weights and scales of 8 bits
            return add(value.CB) + add(value.SCB)
        return 0

    own = {**module._parameters, **module._buffers}
    return add(own) + add({key: value for key, value in vars(module).items() if key in ("meta", "state")})


def report(model: "nn.Module", keys: "QuantizationConfig") -> None:
    """How many layers were quantized and what that saves, in one line."""
    layers = [module for _, module in quantized_layers(model)]
    now, before = sum(map(num_layer_bytes, layers)), 2 * sum(map(num_weights, layers))
    if not layers:
        warn("quantization_bit: this model has no linear layer that can be quantized, so nothing was")
        return
    info(
        f"{len(layers)} linear layers quantized to {keys.quantization_bit} bits ({keys.quantization_method}): "
        f"{now / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB in bfloat16"
    )


def _is_plain(module: "nn.Module") -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return type(module) in (torch.nn.Linear, Conv1D)


def as_linear(layer: Any) -> "nn.Linear":
    """GPT-2 keeps its weights as (in, out) in layers of its own kind."""
    import torch

    if isinstance(layer, torch.nn.Linear):
        return layer
    with torch.device("meta"):
        linear = torch.nn.Linear(layer.weight.shape[0], layer.weight.shape[1], bias=layer.bias is not None)
    linear.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear
