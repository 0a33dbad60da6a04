"""The keys of a run as the configuration of Megatron-Bridge."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.bridge import extra_settings
from luthier.config.keys.mcore import MegatronConfig
from luthier.config.rules.bridge import SCHEDULES
from luthier.core.errors import InvalidInput
from luthier.core.kinds import ADAPTERS
from luthier.core.versions import is_installed
from luthier.workflow.megatron import block_of
from luthier.workflow.megatron.bridge_log import steps_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from luthier.config.keys.bridge import BridgeConfig
    from luthier.config.runs import TrainRun

CHECKPOINTS = "checkpoint-megatron"
"""The folder of checkpoints below `output_dir`; the manifest leaves out what begins like this. They may not lie beside
the final weights: Megatron-Bridge would take the two for a model of Hugging Face, and continue nothing."""
LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""What Megatron-core calls the linear layers."""


def configuration(
    run: "TrainRun",
    args: "TrainingArguments",
    library: Mapping[str, Any],
    bridge: Any,
    folder: str,
    num_rows: int,
    num_evaluated: int,
) -> Any:
    """A ConfigContainer without its `dataset`.

    `library`: the classes of Megatron-Bridge by name. `bridge`: its AutoBridge of the model in `folder`. `num_rows`,
    `num_evaluated`: of training and evaluation. Raises `InvalidInput` for a setting of `extra_config` that is not one.
    """
    keys = run.bridge
    copies = args.world_size // model_parallel_size(keys)
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * copies
    steps_per_epoch = math.ceil(num_rows / batch_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_rows / batch_size)
    trust = {"trust_remote_code": True} if run.model.trust_remote_code else {}
    sharding = {
        "use_distributed_optimizer": keys.use_distributed_optimizer,
        "overlap_param_gather": gathers_early(keys),
        "overlap_grad_reduce": keys.overlap_grad_reduce,
    }
    container = library["ConfigContainer"](
        model=model_provider(run, bridge),
        train=library["TrainingConfig"](
            train_iters=steps, micro_batch_size=args.per_device_train_batch_size, global_batch_size=batch_size
        ),
        validation=library["ValidationConfig"](**evaluations(args, steps, steps_per_epoch, copies, num_evaluated)),
        optimizer=library["OptimizerConfig"](**optimizer_settings(run, args)),
        scheduler=library["SchedulerConfig"](**schedule(args, steps)),
        ddp=library["DistributedDataParallelConfig"](grad_reduce_in_fp32=True, check_for_nan_in_grad=True, **sharding),
        dataset=None,
        logger=library["LoggerConfig"](log_interval=steps_of(args.logging_steps, steps)),
        tokenizer=library["TokenizerConfig"](
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder, hf_tokenizer_kwargs=trust
        ),
        checkpoint=library["CheckpointConfig"](
            pretrained_checkpoint=keys.megatron_pretrained_checkpoint or folder,
            hf_trust_remote_code=run.model.trust_remote_code,
            **checkpoints(run, args, steps, steps_per_epoch),
        ),
        rng=library["RNGConfig"](seed=args.seed),
        peft=adapter(run, library["LoRA"]),
        mixed_precision=keys.mixed_precision,
    )
    for path, value in extra_settings(keys).items():
        override(container, path, value)
    return container


def model_parallel_size(keys: "BridgeConfig") -> int:
    """How many processes compute one row together. Experts are shared among copies of the rest of the model."""
    return keys.tensor_model_parallel_size * keys.pipeline_model_parallel_size * keys.context_parallel_size


def gathers_early(keys: "BridgeConfig") -> bool:
    """Only the distributed optimizer has weights to fetch."""
    return keys.overlap_param_gather and keys.use_distributed_optimizer


def padded_block(run: "TrainRun") -> int:
    """See `block_of`. Pipeline stages and experts exchange activations of one length."""
    keys = run.bridge
    one_length = keys.pipeline_model_parallel_size > 1 or keys.expert_model_parallel_size > 1
    return block_of(keys, run.data.cutoff_len, one_length=one_length)


def model_provider(run: "TrainRun", bridge: Any) -> Any:
    """The model to build, with the keys of Megatron that the user wrote. The weights are read as a checkpoint is."""
    keys = run.bridge
    provider = bridge.to_megatron_provider(load_weights=False)
    for field in fields(MegatronConfig):
        _set(provider, field.name, keys, run)
    _set(provider, "masked_softmax_fusion", keys, run)
    provider.seq_length = block_of(keys, run.data.cutoff_len, one_length=True)
    if keys.context_parallel_size > 1:
        # A process may have a part of a row without targets, and would divide by zero.
        provider.calculate_per_token_loss = True
    if not is_installed("fused_weight_gradient_mlp_cuda"):
        # The library turns this on where Transformer Engine is installed; the output head needs that of apex too.
        provider.gradient_accumulation_fusion = False
    return provider


def _set(provider: Any, name: str, keys: "BridgeConfig", run: "TrainRun") -> None:
    value = getattr(keys, name)
    if name not in run.given or value is None:
        return
    if not hasattr(provider, name):
        raise InvalidInput(f"{name}: the model has no such setting in this Megatron-Bridge -> leave it out")
    setattr(provider, name, value)


def evaluations(
    args: "TrainingArguments", steps: int, steps_per_epoch: int, copies: int, num_rows: int
) -> dict[str, int | None]:
    """The whole evaluation set each time, in whole batches."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if not num_rows or (strategy == "no" and not args.do_eval):
        return {"eval_iters": 0, "eval_interval": None}
    batch_size = args.per_device_eval_batch_size * copies
    interval = {"epoch": steps_per_epoch, "steps": steps_of(args.eval_steps or args.logging_steps, steps)}
    return {
        "eval_iters": math.ceil(num_rows / batch_size),
        "eval_interval": interval.get(strategy),
        "eval_global_batch_size": batch_size,
        "eval_micro_batch_size": args.per_device_eval_batch_size,
    }


def optimizer_settings(run: "TrainRun", args: "TrainingArguments") -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "lr": args.learning_rate,
        "min_lr": 0.0,
        "weight_decay": args.weight_decay,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_eps": args.adam_epsilon,
        "clip_grad": args.max_grad_norm,
        "use_distributed_optimizer": run.bridge.use_distributed_optimizer,
        "overlap_param_gather": gathers_early(run.bridge),
    }


def schedule(args: "TrainingArguments", steps: int) -> dict[str, Any]:
    """Megatron-core shortens a warm-up that is not shorter than the decay, so the decay is prolonged instead."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = 0 if name == "constant" else args.get_warmup_steps(steps)
    return {
        "lr_decay_style": SCHEDULES[name],
        "lr_decay_iters": max(steps, warmup + 1),
        "lr_warmup_iters": warmup,
        "lr_warmup_init": 0.0,
        "start_weight_decay": args.weight_decay,
        "end_weight_decay": args.weight_decay,
        "weight_decay_incr_style": "constant",
        "override_opt_param_scheduler": True,
    }


def checkpoints(run: "TrainRun", args: "TrainingArguments", steps: int, steps_per_epoch: int) -> dict[str, Any]:
    """When and how checkpoints are saved; one is saved at the end too, unless `save_strategy` is no."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return {"save": None}
    return {
        "save": str(Path(run.training["output_dir"], CHECKPOINTS)),
        "save_interval": steps_per_epoch if strategy == "epoch" else steps_of(args.save_steps, steps),
        "ckpt_format": "torch_dist",
        "most_recent_k": args.save_total_limit or -1,
        "save_optim": not args.save_only_model,
        "save_rng": not args.save_only_model,
        "load_optim": not args.save_only_model,
        "load_rng": not args.save_only_model,
        # Any number of processes can continue.
        "dist_ckpt_optim_fully_reshardable": run.bridge.use_distributed_optimizer,
    }


def adapter(run: "TrainRun", kind: Any) -> Any:
    """The LoRA of Megatron-Bridge on all linear layers; None for a whole model."""
    if not ADAPTERS.get(run.finetuning_type).adds_weights:
        return None
    keys = run.adapter
    alpha = 2 * keys.lora_rank if keys.lora_alpha is None else keys.lora_alpha
    return kind(target_modules=list(LAYERS), dim=keys.lora_rank, alpha=alpha, dropout=keys.lora_dropout)


def override(container: Any, path: str, value: Any) -> None:
    """Set e.g. `train.manual_gc`. Raises `InvalidInput` if there is no such setting, or it is one of the rows."""
    *parts, name = path.split(".")
    owner = container
    for part in parts:
        owner = getattr(owner, part, None)
    if owner is None or not hasattr(owner, name):
        raise InvalidInput(
            f"extra_config: {path}: the ConfigContainer of Megatron-Bridge has no such setting, or luthier sets it"
            " -> see its documentation, or leave it out"
        )
    if is_dataclass(getattr(owner, name)):
        raise InvalidInput(f"extra_config: {path}: holds several settings -> name each by its path, as in {path}.NAME")
    setattr(owner, name, value)
