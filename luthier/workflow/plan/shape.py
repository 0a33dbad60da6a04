"""The policy of a run without its weights: the model that training will load, on PyTorch's `meta` device.

It is made by the code that makes the real one (features, adapters, number formats), so its parameters are the same in
number, shape and format.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.training import COMPILING
from luthier.config.rules.bridge import under_megatron
from luthier.core.errors import LuthierError
from luthier.core.kinds import ADAPTERS
from luthier.core.log import quiet
from luthier.core.machine import Machine
from luthier.model.adapters._merge import GivenAdapters, adapter_path, given_adapters
from luthier.model.adapters._new_rows import with_new_rows
from luthier.model.attention import Attention, isolate_samples, reason_to_pad, resolve_attention
from luthier.model.classes import auto_class, is_routed, model_class
from luthier.model.compat.llama4_outputs import give_image_outputs
from luthier.model.dropout import switch_dropout_off
from luthier.model.dtype import upcast_norms
from luthier.model.features import Training
from luthier.model.features.mixture_of_depths import add_routers
from luthier.model.files.readable import UNREADABLE
from luthier.model.heads.value_head import add_value_head
from luthier.model.loading.base import dtype_of, purpose_of, takes_fast_path
from luthier.model.loading.config import fit_task
from luthier.model.loading.features import change_config, change_model
from luthier.model.loading.parameters import parts_to_freeze
from luthier.model.loading.training import new_tokens_of, prepare_for_training
from luthier.model.quantization._layers import layers_to_quantize
from luthier.model.sequence_parallel import PlannedGroup, spread_tokens
from luthier.workflow.plan.trace import Affirming

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from luthier.config.runs import TrainRun
    from luthier.stages import Stage
    from luthier.workflow.text import TextSide

NUMBERS_PER_SCALE = 64
"""Both bitsandbytes and HQQ quantize blocks of 64 weights."""


class Unplanned(Exception):
    """This run does something that the plan has no model of; the text says what."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The policy on the `meta` device, in training mode and without checkpointing."""

    model: "nn.Module"
    dtype: "torch.dtype"
    attention: Attention
    padding_reason: str | None
    low_bit: frozenset[str]
    """The full names of the layers that will be quantized, in the model without its adapter."""
    num_layers: int


def unplanned_reason(run: "TrainRun") -> str | None:
    """Why no model of the memory of this run exists, or None."""
    if run.model.use_unsloth or run.kt.use_kt or under_megatron(run):
        return "another library loads and trains the model"
    if run.fp8.fp8 or any(run.training[key] for key in COMPILING):
        return "its kernels are chosen while it runs"
    return None


def build_shape(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    config: "PreTrainedConfig",
    machine: Machine,
    num_layers: int | None = None,
) -> Shape:
    """`config`: from `load_config`. `num_layers`: that many instead of all. Raises `Unplanned`."""
    import torch

    try:
        with quiet("luthier"), quiet("transformers"), torch.device("meta"), Affirming():
            return _built(run, stage, text, deepcopy(config), machine, num_layers)
    except (*UNREADABLE, LuthierError) as fault:
        # Of a config with odd values, or code of a library that reads numbers, which tensors on `meta` do not have.
        reason = str(fault).strip().partition("\n")[0]
        raise Unplanned(f"the model cannot be built without its weights ({reason})") from fault


def _built(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    config: "PreTrainedConfig",
    machine: Machine,
    num_layers: int | None,
) -> Shape:
    if getattr(config, "quantization_config", None) is not None:
        raise Unplanned("the model is quantized already")
    purpose = purpose_of(run, machine, Training(cutoff_len=run.data.cutoff_len))
    if num_layers is not None:
        _shorten(config, num_layers)
    change_config(run, config, purpose)
    scores = stage.head == "score"
    fit_task(run.model, config, scores=scores, starts_score=scores)
    dtype = dtype_of(run)
    attention = resolve_attention(
        run.model.flash_attn, config=config, model_class=model_class(config), dtype=dtype, machine=machine
    )
    # Kernels that tensors without data do not have hold about what that of PyTorch holds.
    traced = attention.implementation if attention.implementation in ("sdpa", "eager") else "sdpa"
    base = auto_class(config).from_config(
        config, dtype=dtype, attn_implementation=traced, trust_remote_code=run.model.trust_remote_code
    )
    give_image_outputs(base)
    if is_routed(config):
        add_routers(base)
    change_model(run, base, purpose)
    if run.model.upcast_layernorm:
        upcast_norms(base)
    low_bit = frozenset(layers_to_quantize(base)) if run.quantization.quantization_bit is not None else frozenset()
    sees = text.media is not None
    padding_reason = "flash_attn: disabled" if run.model.flash_attn == "disabled" else reason_to_pad(base, sees=sees)
    model = _adapted(run, text, base)
    prepare_for_training(
        model,
        gradient_checkpointing=False,
        upcast_lmhead_output=run.model.upcast_lmhead_output,
        pure_bf16=run.finetuning.pure_bf16,
        fast_path=takes_fast_path(run),
    )
    if padding_reason is None:
        isolate_samples(model)
    if run.parallel.sp_size > 1:
        spread_tokens(model, PlannedGroup(run.parallel.sp_size), padding_reason)
    if not stage.has_dropout:
        switch_dropout_off(model)
    rollout = stage.rollout(run.method)
    if rollout is not None and rollout.has_values:
        add_value_head(model)
    return Shape(model, dtype, attention, padding_reason, low_bit, config.get_text_config().num_hidden_layers)


def _adapted(run: "TrainRun", text: "TextSide", base: Any) -> "nn.Module":
    adapter, given = ADAPTERS.get(run.finetuning_type), given_adapters(run.model)
    if adapter.adds_weights and given and not run.adapter.create_new_adapter:
        import peft

        settings = peft.PeftConfig.from_pretrained(str(adapter_path(given.names[-1], given)))
        settings.inference_mode = False
        keeps_format, new_tokens = run.finetuning.pure_bf16, new_tokens_of(run, text.fitted)
        adapted = peft.get_peft_model(base, settings, autocast_adapter_dtype=not keeps_format)
        return with_new_rows(adapted, new_tokens, pure_bf16=keeps_format) if new_tokens.are_new_to(base) else adapted
    model: nn.Module = adapter.apply(
        base,
        _without_start(run.adapter),
        given=GivenAdapters(),
        new_tokens=new_tokens_of(run, text.fitted),
        pure_bf16=run.finetuning.pure_bf16,
        frozen=parts_to_freeze(base, run.finetuning, sees=text.media is not None),
    )
    return model


def _without_start(keys: Any) -> Any:
    """The keys of an adapter without those that compute its first numbers from the weights."""
    starts = {name: False for name in ("pissa_init", "loftq_init") if name in type(keys).__dataclass_fields__}
    return replace(keys, **starts)


def _shorten(config: "PreTrainedConfig", num_layers: int) -> None:
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[:num_layers]


def layers_are_alike(shape: Shape, config: "PreTrainedConfig") -> bool:
    """Whether every layer has the same parameters, equally trainable, so that a short model stands for a long one."""
    import re

    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    layers: dict[str, set[tuple[str, tuple[int, ...], bool]]] = {}
    for name, weight in shape.model.named_parameters():
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        if found:
            layers.setdefault(found[1] + found[2], set()).add((found[3], tuple(weight.shape), weight.requires_grad))
    return len(layers) == shape.num_layers and len(kinds) <= 1 and len({frozenset(k) for k in layers.values()}) == 1


def num_weight_bytes(run: "TrainRun", shape: Shape) -> int:
    """What all parameters and buffers take in memory; tied ones count once."""
    counted: dict[int, int] = {}
    for name, tensor in (*shape.model.named_parameters(), *shape.model.named_buffers()):
        layer = name.removeprefix("base_model.model.").replace(".base_layer", "").rpartition(".")[0]
        is_low_bit = layer in shape.low_bit and name.endswith("weight") and ".lora_" not in name
        num_bytes = _low_bit_bytes(run, tensor.numel()) if is_low_bit else tensor.numel() * tensor.element_size()
        counted[id(tensor)] = num_bytes
    return sum(counted.values())


def _low_bit_bytes(run: "TrainRun", count: int) -> int:
    """Codes, and a scale for each block: in double quantization a byte, else a float32; HQQ has two of 16 bits."""
    keys = run.quantization
    assert keys.quantization_bit is not None, "asked for quantized layers only"
    scale_bytes = 1 if keys.quantization_method == "bnb" and keys.double_quantization else 4
    return count * keys.quantization_bit // 8 + count // NUMBERS_PER_SCALE * scale_bytes


def num_file_bytes(source: Any) -> int:
    """Of the weight files; 0 where they are still on a hub."""
    if not source.has_weights_here:
        return 0
    if source.files.gguf_file:
        return Path(source.folder, source.files.gguf_file).stat().st_size
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


FORMATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""As safetensors and PyTorch call them."""


def holds_format(source: Any, dtype: str) -> bool:
    """Whether the floating-point numbers in the safetensors files are all in this format."""
    if source.files.gguf_file or not source.has_weights_here:
        return False
    stored = {
        entry["dtype"] for header in source.headers.values() for name, entry in header.items() if name != "__metadata__"
    }
    return {FORMATS.get(name, name) for name in stored} == {dtype}
