"""Checkpoints whose weights were quantized before they were saved: the formats, and what each needs.

The format is read from `quantization_config` in config.json, before any weight is loaded. There are two kinds.
FP8, MXFP4 and, to be trained, exported or adapted, compressed-tensors are unpacked while they are read, and are plain
models from then on. The others stay as they are: an adapter can be trained on them, but not merged into them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.quantization import GROWING_KEYS
from luthier.config.keys.sharding import shards_weights
from luthier.core.errors import MissingExtra, ModelError, Problem
from luthier.core.kinds import ADAPTERS
from luthier.core.log import info, warn
from luthier.core.versions import is_installed
from luthier.model.quantization._hqq_checkpoint import is_qmodel, read_hqq

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True)
class PrequantizedFormat:
    """One kind of quantized checkpoint."""

    words: str
    libraries: tuple[str, ...] = ()
    """Modules that read it."""
    install: str = ""
    """What to call pip with."""
    unpacks: bool = False
    """transformers can unpack it while it is read."""
    stays_for_answers: bool = False
    """Only training, exports and adapters unpack it; answers come from the weights as they are."""
    has_backends: bool = False
    """The library has several kernels, and only some give a gradient."""


GPTQ_LIBRARIES = ("gptqmodel", "optimum")
PREQUANTIZED_FORMATS = {
    "gptq": PrequantizedFormat("GPTQ", GPTQ_LIBRARIES, "'luthier[gptq]'", has_backends=True),
    "awq": PrequantizedFormat("AWQ", ("gptqmodel",), "'luthier[gptq]'", has_backends=True),
    "aqlm": PrequantizedFormat("AQLM", ("aqlm",), "'aqlm[gpu,cpu]'"),
    "bitsandbytes": PrequantizedFormat("bitsandbytes", ("bitsandbytes",), "'luthier[bnb]'"),
    "hqq": PrequantizedFormat("HQQ", ("hqq",), "'luthier[hqq]'"),
    "compressed-tensors": PrequantizedFormat(
        "compressed-tensors", ("compressed_tensors",), "'luthier[compressed]'", unpacks=True, stays_for_answers=True
    ),
    "fp8": PrequantizedFormat("FP8", unpacks=True),
    "mxfp4": PrequantizedFormat("MXFP4", unpacks=True),
}
"""`quant_method` in config.json -> the kind. Of others only transformers knows whether it can load them."""


def prequantized_format_of(config: "PreTrainedConfig | dict[str, Any]") -> tuple[str, PrequantizedFormat] | None:
    """(`quant_method`, kind) of a model's config; None if its weights are plain."""
    if isinstance(config, dict):
        found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
    if not found:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = "bitsandbytes" if is_bitsandbytes else str(settings.get("quant_method", "unknown"))
    return method, PREQUANTIZED_FORMATS.get(method, PrequantizedFormat(method))


def prequantized_format_in(folder: Path) -> tuple[str, PrequantizedFormat] | None:
    """As `prequantized_format_of`, from the config.json of a local folder; None if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # told where the whole folder is checked
        return None
    if not isinstance(config, dict):
        return None
    return prequantized_format_of(config) or (("hqq", PREQUANTIZED_FORMATS["hqq"]) if is_qmodel(folder) else None)


def note_qmodel(config: "PreTrainedConfig", folder: Path) -> None:
    """HQQ's own layout leaves config.json as it was; what it leaves out is put into `config`."""
    if prequantized_format_of(config) is None and is_qmodel(folder):
        config.quantization_config = {"quant_method": "hqq"}


def reader_of(config: "PreTrainedConfig", kind: Any) -> "Callable[..., Any]":
    """What reads a model of the class `kind`: (name, config=, dtype=, ...) -> model and loading info."""
    found = prequantized_format_of(config)
    if found is not None and found[0] == "hqq":
        return partial(read_hqq, kind)
    return partial(kind.from_pretrained, output_loading_info=True)


def problems_with(packing: PrequantizedFormat) -> Iterator[Problem]:
    """Why a checkpoint of this kind cannot be loaded here. Imports nothing."""
    for module in packing.libraries:
        if not is_installed(module):
            reason = f"its weights are quantized ({packing.words}), which needs the library {module}"
            yield Problem(
                "model_name_or_path", f"{reason}, and that is not installed", f"pip install {packing.install}"
            )
            return


def training_problems(packing: PrequantizedFormat, run: "TrainRun") -> Iterator[Problem]:
    """What a training run may not ask of weights of this kind."""
    if packing.unpacks:
        return
    state = f"the weights of this model are quantized ({packing.words})"
    if not ADAPTERS.get(run.finetuning_type).adds_weights:
        reason = f"{state} and cannot be trained, only an adapter on them"
        yield Problem("finetuning_type", reason, "set finetuning_type: lora, or give the original model")
    if shards_weights(run):
        key = "fsdp" if run.training["fsdp"] else "deepspeed"
        yield Problem(key, f"{state} and cannot be sharded between processes", "leave it out, or use ZeRO-2")
    adapters = run.model.adapter_name_or_path
    starts_anew = bool(adapters) and bool(run.given.get("create_new_adapter"))
    if len(adapters) > 1 or starts_anew:
        key = "create_new_adapter" if starts_anew else "adapter_name_or_path"
        reason = f"{state}, and adapters cannot be merged into them, as several of them or a new one on top would ask"
        yield Problem(key, reason, "merge them into the model that it was quantized from, or give one adapter only")
    if run.given.get("loftq_init"):
        reason = f"{state}, and what quantization took from them is not known any more"
        yield Problem("loftq_init", reason, "give the original model, with quantization_bit, or leave it out")
    for key in GROWING_KEYS:
        if run.given.get(key):
            reason = f"{state}, and its embeddings cannot get new rows"
            yield Problem(key, reason, "give the original model, or leave it out")


def require_trainable(run: "TrainRun", config: "PreTrainedConfig") -> None:
    """`training_problems` for a model whose config had to be fetched first. Raises `ModelError`."""
    found = prequantized_format_of(config)
    for problem in training_problems(found[1], run) if found else ():
        raise ModelError(f"{problem.key}: {problem.reason} -> {problem.remedy}")


def prepare_prequantized(name: str, config: "PreTrainedConfig", *, unpacks: bool, quantizes: bool) -> bool:
    """Ready `config` for loading; True if the weights are quantized already.

    `unpacks`: the model is to be trained or exported, or gets an adapter. `quantizes`: the run asks for
    `quantization_bit`, which then has no effect, as a log line says. Raises `ModelError` or `MissingExtra` for what
    cannot be loaded here.
    """
    found = prequantized_format_of(config)
    if found is None:
        return False
    packing = found[1]
    for problem in problems_with(packing):
        raise MissingExtra(f"{name}: {problem.reason} -> {problem.remedy}")
    if quantizes:
        warn(f"quantization_bit: {name}: its weights are quantized already ({packing.words}), so it is not read")
    settings: Any = config.quantization_config
    settings = dict(settings) if isinstance(settings, dict) else settings.to_dict()
    if packing.unpacks and (unpacks or not packing.stays_for_answers):
        settings["dequantize"] = True
        info(f"{name}: quantized weights ({packing.words}) are unpacked while they are read")
    elif packing.has_backends and unpacks:
        settings["backend"] = "auto_trainable"
    if left_plain := settings.get("linear_weights_not_to_quantize"):  # of AQLM, names of weights; layers are asked for
        settings["linear_weights_not_to_quantize"] = [name.removesuffix(".weight") for name in left_plain]
    config.quantization_config = settings
    return True


def mark_dequantized(model: "PreTrainedModel", *, was_packed: bool) -> None:
    """transformers keeps how it unpacked weights, and would pack them again, the head as well, when it saves them."""
    unpacked: Any = model
    if was_packed and prequantized_format_of(model.config) is None:
        unpacked._weight_conversions = None
