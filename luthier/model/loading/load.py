"""From a name to a model with its weights in place, and from a run to a model that is ready to learn or to answer."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from luthier.config.keys.quantization import shards_weights
from luthier.core.kinds import ADAPTERS
from luthier.core.log import info, quiet
from luthier.core.machine import Machine, detect
from luthier.model.adapters._loftq import read_record, round_weights
from luthier.model.adapters._merge import adapter_path, attach_unmerged, merge_adapters
from luthier.model.attention import Attention, isolates_samples, resolve_attention
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.classes import auto_class, checkpoint_dtype, gives_scores, is_routed, model_class
from luthier.model.compat import aqlm_cpu, bitsandbytes_cpu, gguf_speed, ktransformers
from luthier.model.dtype import (
    inference_dtype,
    training_dtype,
    upcast_head_output,
    upcast_norms,
    upcast_trainable,
    warn_slow_format,
)
from luthier.model.embeddings import fit_embeddings
from luthier.model.features.mixture_of_depths import add_routers, prepare, routed_model_class
from luthier.model.features.rope_scaling import require_stretched
from luthier.model.files.hubs import fetching
from luthier.model.files.readable import readable
from luthier.model.files.sources import Source, check_source, locate
from luthier.model.heads.score_head import fit_scorer
from luthier.model.loading.config import config_of, load_config
from luthier.model.loading.configure import (
    fit_positions,
    fit_task,
    fit_training_config,
    given_adapters,
    parts_to_freeze,
    replace_layers,
    require_depths,
)
from luthier.model.loading.loaded import check_found, repair_generation_config, require_causal
from luthier.model.loading.memory_check import placement
from luthier.model.loading.parameters import report_parameters
from luthier.model.modules import unwrap
from luthier.model.quantization._layers import Quantization, is_quantized, plan
from luthier.model.quantization._prequantized import (
    mark_dequantized,
    prepare_prequantized,
    prequantized_format_of,
    reader_of,
)
from luthier.model.tokenizer import FittedTokenizer
from luthier.model.types import LoadedModel

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.keys.model import ModelConfig
    from luthier.config.keys.quantization import QuantizationConfig
    from luthier.config.runs import ExportRun, InferRun, TrainRun


def load_model(
    name_or_path: str,
    *,
    config: "PreTrainedConfig | None" = None,
    dtype: "torch.dtype",
    attn_implementation: str = "sdpa",
    device_map: "str | dict[str, Any] | None" = None,
    offload_folder: str | None = None,
    train_from_scratch: bool = False,
    quantization: Quantization | None = None,
    starts_score: bool = False,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The model of a folder, a GGUF file or a hub id, in `dtype`, in evaluation mode.

    `config`: from `load_config`, if it is there already. `train_from_scratch`: random weights for the config.
    `quantization`: keep the linear layers in few bits, and compute in `dtype`.
    `starts_score`: the score layer of a reward model starts at random if it is not among the weights.
    A GGUF file is de-quantized, so its model can be trained and saved like any other.
    Raises `ModelError` for files that are missing, damaged or do not fill every weight of the model.
    """
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    source = locate(name_or_path, **hub)
    if config is None:
        config = load_config(name_or_path, trust_remote_code=trust_remote_code, **hub)
    check_source(name_or_path, weights=not train_from_scratch, **hub)
    auto = auto_class(config)
    common: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    common["trust_remote_code"] = trust_remote_code
    if train_from_scratch:
        return _with_random_weights(source, auto, config, common)
    if source.gguf_file:
        from transformers import GgufConfig

        common |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    kind = routed_model_class(config) if is_routed(config) else auto
    is_packed = prequantized_format_of(config) is not None
    has_few_bits = quantization is not None or is_packed
    common |= placement(source, dtype, device_map, offload_folder, has_few_bits=has_few_bits)
    if quantization is not None:
        common |= quantization.options(dtype, checkpoint_dtype(config), is_gguf=bool(source.gguf_file))
    said_here = ("transformers.modeling_utils", "transformers.distributed")  # `check_found` says what they would
    with readable(source, "weights"), quiet(said_here[0]), quiet(said_here[1]):
        model, found = reader_of(config, kind)(source.name, config=config, **common, **hub)
    check_found(source, ktransformers.without_experts(found), starts_score=starts_score and gives_scores(config))
    gguf_speed.forget()
    if quantization is not None:
        quantization.finish(model, dtype, is_gguf=bool(source.gguf_file))
    bitsandbytes_cpu.prevent_repacking(model)
    aqlm_cpu.use_dequantized_matmul(model)
    mark_dequantized(model, was_packed=is_packed)
    # Adapters record the name of their base as the user wrote it.
    model.name_or_path = model.config.name_or_path = name_or_path
    repair_generation_config(model)
    if is_routed(config):
        prepare(model)
    return model


def _with_random_weights(
    source: Source, auto: Any, config: "PreTrainedConfig", common: dict[str, Any]
) -> "PreTrainedModel":
    with readable(source, "config"):
        model: PreTrainedModel = auto.from_config(config, **common)
    if is_routed(config):
        add_routers(model)
    return model.eval()


def prepare_for_training(
    model: "nn.Module",
    *,
    gradient_checkpointing: bool = True,
    use_reentrant: bool = True,
    offload: bool = False,
    checkpoint_every: int = 1,
    upcast_lmhead_output: bool = False,
    pure_bf16: bool = False,
) -> None:
    """The last touches on a model whose trainable parameters are settled: number formats, cache, checkpointing."""
    base = unwrap(model)
    if not pure_bf16:
        upcast_trainable(model)
    if upcast_lmhead_output and base.get_output_embeddings() is not None:
        upcast_head_output(base)
    base.config.use_cache = False
    if gradient_checkpointing:
        enable_checkpointing(base, use_reentrant=use_reentrant, offload=offload, checkpoint_every=checkpoint_every)
    model.train()


def load_for_training(
    run: "TrainRun", fitted: FittedTokenizer, machine: Machine | None = None, *, scores: bool = False
) -> LoadedModel:
    """The model of a training run, on the CPU, with exactly the parameters trainable that the run names.

    `fitted`: from `fit_tokenizer`. `scores`: it is to give a text a score instead of writing. Raises `ModelError`.
    """
    import torch

    keys, machine, pure_bf16 = run.model, machine or detect(), run.finetuning.pure_bf16
    if keys.use_unsloth:
        return import_module("luthier.model.backends.unsloth").load_for_training(run, machine)
    torch.manual_seed(run.training["seed"])  # fresh adapters and new weights start at random
    choose_dtype = partial(
        training_dtype, bf16=run.training["bf16"], fp16=run.training["fp16"], pure_bf16=pure_bf16, machine=machine
    )
    base, dtype, attention = _load_base(
        keys,
        machine,
        choose_dtype,
        partial(fit_training_config, run),
        train_from_scratch=keys.train_from_scratch,
        quantization=plan(run.quantization, machine, sharded=shards_weights(run)),
        scores=scores,
        starts_score=scores,
    )
    warn_slow_format(dtype, machine)
    fit_scorer(base, fitted.tokenizer.pad_token_id)
    require_causal(base)
    attention = replace_layers(base, keys, attention, machine)
    padding_reason = _padding_reason(base, keys)
    fit_embeddings(
        base,
        fitted.tokenizer,
        added_tokens=fitted.added_tokens,
        descriptions=fitted.descriptions,
        init=keys.init_special_tokens,
        seed=run.training["seed"],
    )
    if keys.upcast_layernorm:
        upcast_norms(base)
    model = ADAPTERS.get(run.finetuning_type).apply(
        base,
        run.adapter,
        given=given_adapters(keys),
        train_embeddings=keys.resize_vocab or _adds_tokens(keys),
        pure_bf16=pure_bf16,
        frozen=parts_to_freeze(base, run.finetuning),
        original=partial(load_original, base, keys),
    )
    prepare_for_training(
        model,
        gradient_checkpointing=not keys.disable_gradient_checkpointing,
        use_reentrant=_is_reentrant(run),
        offload=keys.use_unsloth_gc,
        checkpoint_every=keys.checkpoint_every,
        upcast_lmhead_output=keys.upcast_lmhead_output,
        pure_bf16=pure_bf16,
    )
    trainable, total = report_parameters(model, one_by_one=keys.print_param_status)
    return LoadedModel(model, dtype, attention, trainable, total, padding_reason)


def load_original(model: "PreTrainedModel", keys: "ModelConfig") -> "PreTrainedModel":
    """`model` once more, with the weights as they are in its files."""
    return load_model(
        model.config._name_or_path,
        dtype=checkpoint_dtype(model.config) or model.dtype,
        attn_implementation="eager",
        **fetching(keys),
    )


def _is_reentrant(run: "TrainRun") -> bool:
    """FSDP cannot follow the reentrant way, which runs the backward pass of a block inside another one, and the balance
    loss of routers gets no gradient there, for the first pass through a block keeps no graph."""
    return run.model.use_reentrant_gc and not run.training["fsdp"] and run.model.moe_aux_loss_coef is None


def _padding_reason(base: "PreTrainedModel", keys: "ModelConfig") -> str | None:
    if keys.flash_attn == "disabled" and not keys.shift_attn:
        return "flash_attn: disabled asks for plain attention"
    return isolates_samples(base)


def load_for_inference(
    run: "InferRun | TrainRun", machine: Machine | None = None, *, scores: bool = False
) -> "PreTrainedModel":
    """The model with all adapters of the run merged, in evaluation mode, where it computes fastest.

    On a quantized model the one adapter stays beside the weights, since these have no room for it.
    """
    machine = machine or detect()
    if run.model.use_unsloth:
        return import_module("luthier.model.backends.unsloth").load_for_inference(run, machine)
    choose_dtype = partial(inference_dtype, run.model.infer_dtype, machine=machine)
    device_map = "auto" if machine.num_accelerators else None
    quantization = plan(run.quantization, machine)
    may_offload = machine.num_accelerators > 0 or "offload_folder" in run.given
    how: dict[str, Any] = {"quantization": quantization, "offload_folder": None}
    if may_offload:
        how["offload_folder"] = run.model.offload_folder
    return load_merged(run.model, machine, choose_dtype, device_map, scores=scores, **how)


def load_for_export(
    run: "ExportRun", machine: Machine | None = None, before_merge: "Callable[[PeftModel], None] | None" = None
) -> "PreTrainedModel":
    """The model with all adapters of the run merged, in the number format it is to be saved in.

    `infer_dtype: auto` keeps that of the checkpoint, whatever this machine computes best. `before_merge` is shown the
    model with each adapter beside it.
    """
    machine = machine or detect()

    def choose_dtype(*, checkpoint: "torch.dtype | None") -> "torch.dtype":
        if run.model.infer_dtype == "auto" and checkpoint is not None:
            return checkpoint
        return inference_dtype(run.model.infer_dtype, checkpoint=checkpoint, machine=machine)

    device_map = "auto" if run.export.export_device == "auto" else None
    how: dict[str, Any] = {"unpacks": True, "scores": None, "rounding": run.quantization}
    return load_merged(run.model, machine, choose_dtype, device_map, before_merge, **how)


def load_merged(
    keys: "ModelConfig",
    machine: Machine,
    choose_dtype: "Callable[..., torch.dtype]",
    device_map: str | None,
    before_merge: "Callable[[PeftModel], None] | None" = None,
    quantization: Quantization | None = None,
    unpacks: bool = False,
    scores: bool | None = False,
    rounding: "QuantizationConfig | None" = None,
    offload_folder: str | None = None,
) -> "PreTrainedModel":
    """The model with all adapters merged, or beside its weights where these are quantized, in evaluation mode.

    `scores`: whether a reward model is wanted, None for whatever it is. `rounding`: an adapter of LoftQ is merged into
    what these keys make of the weights. `offload_folder`: see `placement`.
    """
    fit_config = partial(fit_positions, keys, None)
    unpacks = unpacks or bool(keys.adapter_name_or_path)
    how: dict[str, Any] = {"device_map": device_map, "quantization": quantization, "unpacks": unpacks}
    how["offload_folder"] = offload_folder
    model, _, _ = _load_base(keys, machine, choose_dtype, fit_config, scores=scores, **how)
    given = given_adapters(keys)
    if given and rounding is not None and (record := read_record(adapter_path(given.names[0], given))) is not None:
        round_weights(model, plan(rounding, machine), record)
    put = (
        attach_unmerged
        if is_quantized(model)
        else partial(merge_adapters, names=given.names, before_merge=before_merge)
    )
    model = put(model, given=given)
    model.config.use_cache = keys.use_kv_cache and not is_routed(model.config)
    return model.eval()


def _load_base(
    keys: "ModelConfig",
    machine: Machine,
    choose_dtype: "Callable[..., torch.dtype]",
    fit_config: "Callable[[PreTrainedConfig], None]",
    *,
    device_map: str | None = None,
    offload_folder: str | None = None,
    train_from_scratch: bool = False,
    quantization: Quantization | None = None,
    unpacks: bool = True,
    scores: bool | None = False,
    starts_score: bool = False,
) -> "tuple[PreTrainedModel, torch.dtype, Attention]":
    """The model without adapters, and what became of the number format and the attention asked for.

    `fit_config`: changes the config before the model is built. `unpacks`: see `prepare_prequantized`. `scores`,
    `starts_score`: see `fit_task`.
    """
    config = config_of(keys)
    fit_config(config)
    require_depths(keys, config)
    if prepare_prequantized(keys.model_name_or_path, config, unpacks=unpacks, quantizes=quantization is not None):
        quantization = None
    starts_score = fit_task(keys, config, scores=scores, starts_score=starts_score)
    dtype = choose_dtype(checkpoint=checkpoint_dtype(config))
    attention = resolve_attention(
        keys.flash_attn, config=config, model_class=model_class(config), dtype=dtype, machine=machine
    )
    if attention.reason:
        info(f"flash_attn: {keys.flash_attn}: {attention.reason}")
    model = load_model(
        keys.model_name_or_path,
        config=config,
        dtype=dtype,
        attn_implementation=attention.implementation,
        device_map=device_map,
        offload_folder=offload_folder,
        train_from_scratch=train_from_scratch,
        quantization=quantization,
        starts_score=starts_score,
        trust_remote_code=keys.trust_remote_code,
        **fetching(keys),
    )
    ktransformers.place_experts(model, machine)
    if gives_scores(model.config) and model.config.pad_token_id is None:
        fit_scorer(model, 0)
    if keys.rope_scaling:
        require_stretched(model, keys.rope_scaling)
    return model, dtype, attention


def _adds_tokens(keys: "ModelConfig") -> bool:
    return bool(keys.add_tokens or keys.add_special_tokens or keys.new_special_tokens_config)
