"""Checkpoints in HQQ's formats: read layer by layer into the library's own layers, without a copy in full precision.

Two layouts hold the same. transformers 4 wrote safetensors in which each layer is `<layer>.W_q`, `<layer>.scale`,
`<layer>.zero` and, as tensors too, its settings: numbers, and words as character codes. The library itself writes
`qmodel.pt`, {layer: {`W_q`, `scale`, `zero`, settings}}, beside a config.json that says nothing of it.

w = (q - zero) scale, with q in 1 to 8 bits, several in one number of `W_q`. transformers 5 reads plain tensors only, so
it meets empty places where quantized layers belong, and these are filled when it is done.

Shapes: before they are packed, the numbers of a layer lie as (out in / group, group) with axis 1, as (group,
out in / group) with axis 0. Packing makes one row of several, and `scale` and `zero` have one number for each group.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.machine import detect
from luthier.model.classes import model_class
from luthier.model.files.sources import QMODEL_FILE

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_ROWS_IN_ONE = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
"""`packing` -> rows of numbers in one row of `W_q`."""
_AGAIN = "the files are incomplete or damaged; copy or download them again"

Stored = dict[str, Callable[[], Any]]
"""Key of a layer -> what reads its tensor or setting."""


def is_qmodel(folder: Path) -> bool:
    """Whether the library itself wrote the weights in `folder`."""
    return (folder / QMODEL_FILE).is_file()


def read_hqq(
    kind: Any, name: str, *, config: "PreTrainedConfig", dtype: "torch.dtype", **options: Any
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The model, whole on the device of this process, and the loading info. `kind`, `options`: of `from_pretrained`.

    `name`: a folder or a hub id. Raises `ModelError` for layers that are not whole or do not fit the config.
    """
    from luthier.model.kernels.hqq_layers import hqq_marker

    machine = detect()
    device = f"{machine.device}:{machine.local_rank}" if machine.num_accelerators else machine.device
    place = {"device_map": {"": device} if machine.num_accelerators else None, "offload_folder": None}
    settings = config.quantization_config
    given: dict[str, Any] = {"pretrained_model_name_or_path": name}
    layers = None
    if is_qmodel(Path(name)):
        layers, plain = _read_qmodel(Path(name) / QMODEL_FILE)
        given, kind = {"pretrained_model_name_or_path": None, "state_dict": plain}, _class_of(name, kind, config)
    reader = _Reader(name, dtype, device, layers)
    del config.quantization_config
    options = {**options, **given, **place, "config": config, "dtype": dtype, "output_loading_info": True}
    try:
        model, found = kind.from_pretrained(quantization_config=hqq_marker(reader), **options)
    finally:
        config.quantization_config = settings
    model.hf_quantizer.remove_quantization_config(model)
    model.config.quantization_config = settings
    found["unexpected_keys"] = {key for key in found["unexpected_keys"] if not reader.has_taken(key)}
    return model, found


def _class_of(name: str, kind: Any, config: "PreTrainedConfig") -> Any:
    """An automatic class takes no tensors, so the class of the model itself. `kind`, if it is one."""
    from transformers import PreTrainedModel

    if issubclass(kind, PreTrainedModel):
        return kind
    found = model_class(config)
    if found is None:
        raise ModelError(
            f"{name}: a {QMODEL_FILE} of a model with Python code of its own cannot be loaded"
            " -> give the original model, with quantization_method: hqq"
        )
    return found


class _Reader:
    """Makes room for the quantized layers in a model without weights, and fills it once the others are read."""

    def __init__(self, source: str, dtype: "torch.dtype", device: str, layers: dict[str, Stored] | None) -> None:
        self.source, self.dtype, self.device, self.layers = source, dtype, device, layers
        self.rooms: dict[str, tuple[str, nn.Linear]] = {}
        """Place in the model -> name in the files, and the layer it would be, without weights."""

    def __deepcopy__(self, memo: Any) -> "_Reader":
        return self  # transformers copies a config with all that it holds

    def make_room(self, model: "PreTrainedModel", files: list[str] | None) -> None:
        """`files`: of the weights; None if `layers` was given."""
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if self.layers is None:
            self.layers = _layers_in(map(Path, files or ()))
        if not self.layers:
            raise ModelError(
                f"{self.source}: its config says HQQ, and none of its files holds such a layer -> {_AGAIN}"
            )
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        expected, modules = model.state_dict(), dict(model.named_modules())
        for stored in self.layers:
            renamed, merged = rename_source_key(
                f"{stored}.weight", renamings, converters, model.base_model_prefix, meta_state_dict=expected
            )
            name = renamed.removesuffix(".weight")
            layer = modules.get(name)
            if isinstance(layer, torch.nn.Linear):
                self.rooms[name] = stored, layer
                model.set_submodule(name, torch.nn.Module())
            elif merged is not None:
                raise ModelError(
                    f"{self.source}: its layer {stored} is quantized (HQQ), and transformers keeps it as a part of a"
                    " larger tensor, as it does with experts -> give the original model, with quantization_method: hqq"
                )

    def fill(self, model: "PreTrainedModel") -> None:
        assert self.layers is not None
        for name, (stored, layer) in self.rooms.items():
            try:
                filled = _layer(self.layers.pop(stored), layer, self.dtype, self.device)
            except (KeyError, TypeError, ValueError, RuntimeError) as fault:
                reason = f"{fault.args[0]} is missing" if isinstance(fault, KeyError) else str(fault).split("\n")[0]
                raise ModelError(
                    f"{self.source}: its HQQ layer {stored} cannot be read ({reason}) -> {_AGAIN}"
                ) from fault
            model.set_submodule(name, filled.requires_grad_(False).eval())

    def has_taken(self, key: str) -> bool:
        owner = key.rpartition(".")[0]
        return owner in self.rooms or any(owner == stored for stored, _ in self.rooms.values())


def _layer(stored: Stored, layer: "nn.Linear", dtype: "torch.dtype", device: str) -> "nn.Module":
    """Raises `KeyError`, `TypeError` and `ValueError` for what is missing or makes no sense."""
    import torch
    from hqq.core.quantize import HQQLinear, Quantizer

    state: dict[str, Any] = {key: read() for key, read in stored.items()}
    state |= state.pop("meta", {})
    shape, packing = torch.Size(int(length) for length in state["shape"]), _text(state["packing"])
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(f"it is {tuple(shape)}, and {(layer.out_features, layer.in_features)} in config.json")
    if packing not in _ROWS_IN_ONE:
        raise ValueError(f"its packing is {packing!r}")
    facts = {key: int(state[key]) for key in ("nbits", "group_size", "axis")}
    facts |= {key: bool(state.get(key, key != "round_zero")) for key in ("channel_wise", "optimize", "round_zero")}
    number_format = Quantizer.unpack_view_dtype[packing]
    weight = _fitting("W_q", state["W_q"].view(number_format), _packed_shape(packing, facts, shape))
    pair = _scale_and_zero(state, facts, shape)
    bias = state.get("bias")
    if (bias is None) != (layer.bias is None) or (bias is not None and bias.shape != shape[:1]):
        raise ValueError("its bias is not that of config.json")
    filled: Any = HQQLinear(None, None, compute_dtype=dtype, device=device)
    filled.load_state_dict(
        {
            **facts,
            **pair,
            "W_q": torch.nn.Parameter(weight, requires_grad=False),
            "bias": None if bias is None else torch.nn.Parameter(bias, requires_grad=False),
            "shape": shape,
            "packing": packing,
            "unpack_view_dtype": number_format,
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "offload_meta": False,
            "stores_quant_config": True,
        }
    )
    if dtype == torch.float32:  # the library makes both 32 bits wide, which is half of what the weights took
        filled.meta |= {key: value.to(device) for key, value in pair.items()}
    return filled


def _packed_shape(packing: str, facts: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = _grouped_shape(facts, shape)
    return -(-rows // _ROWS_IN_ONE[packing]), columns


def _grouped_shape(facts: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the numbers of a layer before they are packed."""
    if not facts["channel_wise"]:
        return shape[0], shape[1]
    group, left_over = facts["group_size"], prod(shape) % facts["group_size"]
    if left_over or facts["axis"] not in (0, 1):
        raise ValueError(f"groups of {group} along axis {facts['axis']} do not make {tuple(shape)}")
    others = prod(shape) // group
    return (others, group) if facts["axis"] == 1 else (group, others)


def _scale_and_zero(state: dict[str, Any], facts: dict[str, Any], shape: tuple[int, ...]) -> "dict[str, torch.Tensor]":
    """Plain, one number for each group. Old files have them beside one another, or quantized themselves."""
    from hqq.core.quantize import Quantizer

    rows, columns = _grouped_shape(facts, shape)
    expected = ((rows, 1) if facts["axis"] == 1 else (1, columns)) if facts["channel_wise"] else ()
    pair = {}
    for place, key in enumerate(("zero", "scale")):
        stacked = state.get("zero_scale")
        if state.get(f"quant_{key}"):
            quantized = state[f"{key}_q"] if stacked is None else stacked[place]
            value = Quantizer.dequantize(quantized, {"view_as_float": False, **state[f"meta_{key}"]})
        else:
            value = state[key] if stacked is None else stacked[place]
        if not value.is_floating_point():
            raise ValueError(f"its {key} are {value.dtype}")
        pair[key] = _fitting(key, value, expected)
    return pair


def _fitting(key: str, value: "torch.Tensor", expected: tuple[int, ...]) -> "torch.Tensor":
    if value.shape != expected:
        raise ValueError(f"its {key} is {tuple(value.shape)} instead of {expected}")
    return value


def _text(value: "torch.Tensor | str") -> str:
    """Of character codes. The library runs those that name a number format as Python code; here they are only read."""
    return value if isinstance(value, str) else bytes(value.tolist()).decode("ascii")


def _layers_in(files: Iterable[Path]) -> dict[str, Stored]:
    """The quantized layers in safetensors, or in files of PyTorch. Nothing is read yet."""
    import torch
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in files:
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            readers = {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            readers = {name: partial(tensors.__getitem__, name) for name in tensors}
        for name, read in readers.items():
            layer, _, key = name.rpartition(".")
            found.setdefault(layer, {})[key] = read
    return {layer: stored for layer, stored in found.items() if "W_q" in stored}


def _read_qmodel(path: Path) -> "tuple[dict[str, Stored], dict[str, torch.Tensor]]":
    """(quantized layers, plain tensors by full name). The tensors stay in the file until they are asked for."""
    import torch

    try:
        modules = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        quantized = {name: state for name, state in modules.items() if "W_q" in state}
        plain = {
            f"{name}.{key}": value
            for name, state in modules.items()
            if name not in quantized
            for key, value in state.items()
        }
    except (OSError, RuntimeError, ValueError, EOFError, AttributeError, TypeError, UnpicklingError) as fault:
        reason = str(fault).split("\n")[0] or type(fault).__name__
        raise ModelError(f"{path}: this is not a complete HQQ file ({reason}) -> copy or download it again") from fault
    layers: dict[str, Stored] = {
        name: {key: partial(state.get, key) for key in state} for name, state in quantized.items()
    }
    return layers, plain
