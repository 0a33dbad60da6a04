"""The model that a run names, without its adapters: config, features, number format, attention, weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.runs import EvalRun, TrainRun
from luthier.core.log import info
from luthier.core.machine import Machine
from luthier.model.adapters._merge import adapter_path, given_adapters
from luthier.model.attention import Attention, resolve_attention
from luthier.model.classes import checkpoint_dtype, gives_scores, model_class
from luthier.model.compat import ktransformers
from luthier.model.dtype import inference_dtype, training_dtype
from luthier.model.features import Purpose, Training
from luthier.model.files.sources import ModelSource
from luthier.model.heads.score_head import fit_scorer
from luthier.model.loading.config import fit_task
from luthier.model.loading.features import change_config
from luthier.model.loading.load import load_model
from luthier.model.quantization._layers import Quantization
from luthier.model.quantization._prequantized import prepare_prequantized

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.runs import Run


@dataclass(frozen=True, slots=True)
class BaseModel:
    model: "PreTrainedModel"
    dtype: "torch.dtype"
    """Of the weights."""
    attention: Attention


def purpose_of(run: "Run", machine: Machine, training: Training | None = None) -> Purpose:
    """Raises `ModelError` for an adapter that is unavailable."""
    given = given_adapters(run.model)
    folder = adapter_path(given.names[-1], given) if given else None
    name = run.model.model_name_or_path
    return Purpose(name=name, machine=machine, adapter_folder=folder, training=training)


def dtype_of(run: TrainRun) -> "torch.dtype":
    """The format that the weights of a training run are loaded in."""
    return training_dtype(bf16=run.training["bf16"], fp16=run.training["fp16"], pure_bf16=run.finetuning.pure_bf16)


def inference_dtype_of(run: "Run", *, checkpoint: "torch.dtype | None", machine: Machine) -> "torch.dtype":
    """The format that the weights of a run which trains nothing are loaded in.

    An evaluation by `luthier train` measures the weights as they are saved: with `infer_dtype: auto` it has them in the
    16 bits that `bf16` or `fp16` asks for, but does not round a float32 checkpoint unasked.
    """
    import torch

    if isinstance(run, TrainRun) and not isinstance(run, EvalRun) and run.model.infer_dtype == "auto":
        asked = dtype_of(run)
        if asked.itemsize == 2 or checkpoint == torch.float32:
            return asked
    return inference_dtype(run.model.infer_dtype, checkpoint=checkpoint, machine=machine)


def load_base(
    run: "Run",
    source: ModelSource,
    config: "PreTrainedConfig",
    purpose: Purpose,
    *,
    choose_dtype: "Callable[..., torch.dtype]",
    quantization: Quantization | None = None,
    device_map: "str | dict[str, str] | None" = None,
    offload_folder: str | None = None,
    unpacks: bool = True,
    scores: bool | None = False,
    starts_score: bool = False,
    tp_size: int = 1,
) -> BaseModel:
    """`config`: from `load_config`, changed by features. `choose_dtype`: (checkpoint=) -> the format of the weights.

    `unpacks`: see `prepare_prequantized`. `scores`, `starts_score`: see `fit_task`. `tp_size`: processes that
    share each layer. The caller applies `change_model`.
    """
    keys = run.model
    change_config(run, config, purpose)
    if prepare_prequantized(keys.model_name_or_path, config, unpacks=unpacks, quantizes=quantization is not None):
        quantization = None
    starts_score = fit_task(keys, config, scores=scores, starts_score=starts_score)
    dtype = choose_dtype(checkpoint=checkpoint_dtype(config))
    attention = resolve_attention(
        keys.flash_attn, config=config, model_class=model_class(config), dtype=dtype, machine=purpose.machine
    )
    if attention.reason:
        info(f"flash_attn: {keys.flash_attn}: {attention.reason}")
    model = load_model(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attention.implementation,
        device_map=device_map,
        offload_folder=offload_folder,
        train_from_scratch=purpose.training is not None and keys.train_from_scratch,
        quantization=quantization,
        starts_score=starts_score,
        tp_size=tp_size,
    )
    ktransformers.place_experts(model, purpose.machine)
    if gives_scores(model.config) and model.config.get_text_config().pad_token_id is None:
        fit_scorer(model, 0)
    return BaseModel(model, dtype, attention)


def takes_fast_path(run: "TrainRun") -> bool:
    """Whether the models of this run compute with the kernels of `luthier.model.kernels`, which take whole weights."""
    return run.model.fast_path and run.parallel.tp_size == 1
