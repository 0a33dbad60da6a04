"""From a training run to a model whose trainable parameters are settled."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from luthier.config.keys.sharding import shards_weights, uses_fsdp
from luthier.core.kinds import ADAPTERS
from luthier.core.machine import Machine
from luthier.model.adapters._continued import written_for
from luthier.model.adapters._merge import given_adapters, series_beneath
from luthier.model.adapters._series import Series, note_beneath
from luthier.model.attention import SHIFTED, Attention, Trial, isolates_samples
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.classes import checkpoint_dtype
from luthier.model.dtype import upcast_head_output, upcast_norms, upcast_trainable, warn_slow_format
from luthier.model.embeddings import NewTokens
from luthier.model.features import Training
from luthier.model.files.sources import ModelSource
from luthier.model.heads.score_head import fit_scorer
from luthier.model.loading.base import dtype_of, load_base, purpose_of, takes_fast_path
from luthier.model.loading.config import load_config
from luthier.model.loading.features import change_model
from luthier.model.loading.load import load_model
from luthier.model.loading.loaded import require_causal
from luthier.model.loading.parameters import parts_to_freeze, report_parameters
from luthier.model.modules import unwrap
from luthier.model.quantization._layers import is_quantized, plan
from luthier.model.quantization._prequantized import require_trainable
from luthier.model.tokenizer import name_ends
from luthier.model.types import LoadedModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from luthier.config.runs import TrainRun
    from luthier.model.tokenizer import FittedTokenizer


def load_for_training(
    run: "TrainRun",
    source: ModelSource,
    fitted: "FittedTokenizer",
    machine: Machine,
    scores: bool = False,
    recomputed_layers: int | None = None,
    trial: Trial | None = None,
) -> LoadedModel:
    """The model of a training run, with exactly the parameters trainable that the run names.

    `fitted`: from `fit_tokenizer`. `scores`: load a reward model instead of a language model.
    `recomputed_layers`: how many layers gradient checkpointing computes again; None: as the keys of the run say.
    `trial`: for a run with images, see `luthier.model.attention`. Raises `ModelError`.
    """
    import torch

    keys, seed = run.model, run.training["seed"]
    torch.manual_seed(seed)  # new adapters, and weights that no file has, are random
    config = load_config(source)
    require_trainable(run, config)
    purpose = purpose_of(run, machine, Training(cutoff_len=run.data.cutoff_len))
    loaded = load_base(
        run,
        source,
        config,
        purpose,
        choose_dtype=lambda *, checkpoint: dtype_of(run),
        quantization=plan(run.quantization, machine, sharded=shards_weights(run)),
        scores=scores,
        starts_score=scores,
        tp_size=run.parallel.tp_size,
    )
    base = loaded.model
    warn_slow_format(loaded.dtype, machine)
    fit_scorer(base, fitted.tokenizer.pad_token_id)
    name_ends(base, fitted.stop_token_ids)
    require_causal(base)
    change_model(run, base, purpose)
    place(run, base, machine)
    attention = Attention(SHIFTED) if run.features.shifted_attention.shift_attn else loaded.attention
    if keys.upcast_layernorm:
        upcast_norms(base)
    beneath, padding_reason = _beneath(run, source), _padding_reason(run, base, trial)
    model = ADAPTERS.get(run.finetuning_type).apply(
        base,
        run.adapter,
        given=replace(given_adapters(keys), written=written_for(run)),
        new_tokens=new_tokens_of(run, fitted),
        pure_bf16=run.finetuning.pure_bf16,
        frozen=parts_to_freeze(base, run.finetuning, sees=trial is not None),
        original=partial(load_original, source, base),
    )
    _prepare(run, note_beneath(model, beneath), recomputed_layers)
    trainable, total = report_parameters(model, one_by_one=keys.print_param_status)
    return LoadedModel(model, loaded.dtype, attention, trainable, total, padding_reason)


def place(run: "TrainRun", base: "PreTrainedModel", machine: Machine) -> None:
    """Move a model to the device that it trains on, so that it is tried there and its adapters start there.

    Not one whose weights will be sharded, which may be larger than the device, nor one that a library has placed.
    """
    stays = shards_weights(run) or run.parallel.tp_size > 1 or run.kt.use_kt or run.training["use_cpu"]
    if machine.num_accelerators and not stays and not is_quantized(base):
        base.to(f"{machine.device}:{machine.local_rank}")  # type: ignore[arg-type]


def _prepare(run: "TrainRun", model: "nn.Module", recomputed_layers: int | None) -> None:
    keys = run.model
    prepare_for_training(
        model,
        gradient_checkpointing=not keys.disable_gradient_checkpointing and recomputed_layers != 0,
        use_reentrant=is_reentrant(run, by_fsdp=uses_fsdp(run)),
        offload=keys.use_unsloth_gc,
        checkpoint_every=keys.checkpoint_every,
        recomputed_layers=recomputed_layers,
        upcast_lmhead_output=keys.upcast_lmhead_output,
        pure_bf16=run.finetuning.pure_bf16,
        fast_path=takes_fast_path(run),
    )


def new_tokens_of(run: "TrainRun", fitted: "FittedTokenizer") -> NewTokens:
    """Single rows of sharded weights cannot be trained, so there all are.

    Keys that add only tokens which the tokenizer has already change nothing. With given adapters it has theirs.
    """
    keys = run.features.new_tokens
    grows = keys.may_grow and bool(keys.resize_vocab or fitted.added_tokens or run.model.adapter_name_or_path)
    return NewTokens(
        fitted.tokenizer,
        fitted.added_tokens,
        fitted.descriptions,
        keys.init_special_tokens,
        run.training["seed"],
        trains_whole=grows or (bool(fitted.added_tokens) and shards_weights(run)),
        trains_single=not shards_weights(run),
    )


def _beneath(run: "TrainRun", source: ModelSource) -> Series:
    """The adapters that a new or continued one will be on. Raises `ModelError` as `series_beneath` does."""
    if not ADAPTERS.get(run.finetuning_type).adds_weights:
        return ()
    return series_beneath(given_adapters(run.model), source, creates_new=run.adapter.create_new_adapter)


def prepare_for_training(
    model: "nn.Module",
    *,
    gradient_checkpointing: bool = True,
    use_reentrant: bool = True,
    offload: bool = False,
    checkpoint_every: int = 1,
    recomputed_layers: int | None = None,
    upcast_lmhead_output: bool = False,
    pure_bf16: bool = False,
    fast_path: bool = False,
) -> None:
    """The last changes to a model whose trainable parameters are settled: formats, cache, checkpointing, kernels."""
    base = unwrap(model)
    if not pure_bf16:
        upcast_trainable(model)
    if upcast_lmhead_output and base.get_output_embeddings() is not None:
        upcast_head_output(base)
    base.config.use_cache = False
    if gradient_checkpointing:
        enable_checkpointing(
            base,
            use_reentrant=use_reentrant,
            offload=offload,
            checkpoint_every=checkpoint_every,
            num_layers=recomputed_layers,
        )
    if fast_path:
        from luthier.model.kernels.fuse import fuse

        fuse(model)
    model.train()


def load_original(source: ModelSource, model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` once more, with the weights as they are in its files."""
    dtype = checkpoint_dtype(model.config) or model.dtype
    return load_model(source, dtype=dtype, attn_implementation="eager")


def is_reentrant(run: "TrainRun", *, by_fsdp: bool) -> bool:
    """The way in which blocks are computed again. `by_fsdp`: the weights are sharded by FSDP.

    FSDP does not support reentrant checkpointing, which runs the backward pass of a block inside another one. Nor
    does the balance loss of routers get a gradient there, since the first pass through a block keeps no graph."""
    balances = run.features.router_balance.moe_aux_loss_coef is not None
    return run.model.use_reentrant_gc and not by_fsdp and not balances


def _padding_reason(run: "TrainRun", base: "PreTrainedModel", trial: Trial | None) -> str | None:
    if run.model.flash_attn == "disabled" and not run.features.shifted_attention.shift_attn:
        return "flash_attn: disabled asks for plain attention"
    return isolates_samples(base, trial)
