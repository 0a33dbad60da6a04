"""A stand-in for Megatron-Bridge: the names, signatures and settings that luthier uses, over the model of transformers.

As in the library, a training run is a ConfigContainer, weights are read from `checkpoint.pretrained_checkpoint`, rows
come from a DatasetProvider in order, labels are not shifted, and callbacks are told what happens. Facts of
https://github.com/NVIDIA-NeMo/Megatron-Bridge, 0.6.0, 2026-08.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_scheduler

EVENTS = ("on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end", "on_eval_end")


@dataclass
class GPTModelProvider:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    moe_token_dispatcher_type: str = "allgather"
    masked_softmax_fusion: bool = True
    calculate_per_token_loss: bool = False
    gradient_accumulation_fusion: bool = True
    qk_layernorm: bool = False
    seq_length: int = 1024


class AutoBridge:
    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> "AutoBridge":
        if not Path(path, "config.json").is_file():
            raise ValueError("Failed to load configuration")
        return cls()

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | None = None) -> GPTModelProvider:
        assert not load_weights
        return GPTModelProvider()

    def save_hf_pretrained(self, model: list[Any], path: str | Path, show_progress: bool = True) -> None:
        model[0].save_pretrained(path)

    def save_hf_adapter(
        self,
        model: list[Any],
        path: str | Path,
        peft_config: "LoRA",
        base_model_name_or_path: str | None = None,
        show_progress: bool = True,
    ) -> None:
        model[0].peft_config["default"].base_model_name_or_path = base_model_name_or_path
        model[0].save_pretrained(path)


@dataclass
class LoRA:
    target_modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0


@dataclass(kw_only=True)
class TrainingConfig:
    train_iters: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    manual_gc: bool = False


@dataclass(kw_only=True)
class ValidationConfig:
    eval_iters: int | None = 100
    eval_interval: int | None = None
    eval_global_batch_size: int | None = None
    eval_micro_batch_size: int | None = None


@dataclass
class OptimizerConfig:
    optimizer: str = "adam"
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False


@dataclass(kw_only=True)
class SchedulerConfig:
    lr_decay_style: str = "linear"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_init: float = 0.0
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: str = "constant"
    override_opt_param_scheduler: bool = False


@dataclass
class DistributedDataParallelConfig:
    grad_reduce_in_fp32: bool = False
    check_for_nan_in_grad: bool = False
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    overlap_grad_reduce: bool = False


@dataclass(kw_only=True)
class LoggerConfig:
    log_interval: int = 100


@dataclass(kw_only=True)
class CheckpointConfig:
    save: str | None = None
    save_interval: int | None = None
    load: str | None = None
    pretrained_checkpoint: str | None = None
    ckpt_format: str = "torch_dist"
    most_recent_k: int | None = -1
    save_optim: bool = True
    save_rng: bool = True
    load_optim: bool = True
    load_rng: bool = True
    dist_ckpt_optim_fully_reshardable: bool = False
    hf_source_path: str | None = None
    hf_trust_remote_code: bool = False


@dataclass(kw_only=True)
class RNGConfig:
    seed: int = 1234


@dataclass(kw_only=True)
class TokenizerConfig:
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    hf_tokenizer_kwargs: dict[str, Any] | None = None


@dataclass(kw_only=True)
class DatasetProvider(ABC):
    dataloader_type: str | None = None
    num_workers: int = 2
    pin_memory: bool = True
    persistent_workers: bool = True

    @abstractmethod
    def build_datasets(self, context: Any) -> tuple[Any | None, Any | None, Any | None]: ...


@dataclass(kw_only=True)
class ConfigContainer:
    model: Any
    train: TrainingConfig
    validation: ValidationConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    ddp: DistributedDataParallelConfig
    dataset: Any
    logger: LoggerConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    rng: RNGConfig
    peft: Any = None
    mixed_precision: str | None = None


class CallbackManager:
    def __init__(self) -> None:
        self.callbacks: dict[str, Callable[[Any], None]] = {}

    def register(self, event_name: str, fn: Callable[[Any], None]) -> None:
        assert event_name in EVENTS
        self.callbacks[event_name] = fn


def forward_step(state: Any, batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of the tokens that count, and their number."""
    batch = next(batches)
    logits = model(input_ids=batch["tokens"], position_ids=batch["position_ids"]).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten()
    return (losses * mask).sum(), mask.sum()


def batches_of(dataset: Any, size: int, consumed: int) -> Iterator[Any]:
    """In order, as the sampler of the type `single` does; it refuses a run that has had all rows."""
    assert consumed < len(dataset), "no samples left to consume"
    for start in range(consumed, len(dataset) - size + 1, size):
        yield dataset.collate_fn([dataset[number] for number in range(start, start + size)])


def finetune(config: ConfigContainer, forward_step_func: Any, callbacks: CallbackManager | None = None) -> None:
    assert config.checkpoint.pretrained_checkpoint and config.dataset.dataloader_type == "single"
    manager, train, checks = callbacks or CallbackManager(), config.train, config.validation
    model = AutoModelForCausalLM.from_pretrained(config.checkpoint.pretrained_checkpoint, dtype=torch.float32)
    if config.peft is not None:
        import peft

        settings = peft.LoraConfig(r=config.peft.dim, lora_alpha=config.peft.alpha, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
    learns = [weight for weight in model.parameters() if weight.requires_grad]
    options = config.optimizer
    betas = options.adam_beta1, options.adam_beta2
    optimizer = torch.optim.AdamW(learns, options.lr, betas, options.adam_eps, options.weight_decay)
    plan = config.scheduler
    scheduler = get_scheduler(plan.lr_decay_style, optimizer, plan.lr_warmup_iters, plan.lr_decay_iters)
    step = 0
    if config.checkpoint.load:
        saved = torch.load(Path(config.checkpoint.load, "latest_train_state.pt"))
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    size, each = train.global_batch_size, checks.eval_iters or 0
    num_evaluations = train.train_iters // checks.eval_interval + 1 if checks.eval_interval else 0
    valid_samples = num_evaluations * each * (checks.eval_global_batch_size or size)
    context = SimpleNamespace(train_samples=train.train_iters * size, valid_samples=valid_samples, test_samples=0)
    rows, valid_rows, _ = config.dataset.build_datasets(context)
    batches = batches_of(rows, train.micro_batch_size, step * size)
    valid_batches = batches_of(valid_rows, checks.eval_micro_batch_size, 0) if each else iter(())
    state = SimpleNamespace(train_state=SimpleNamespace(step=step), cfg=config)

    def tell(event: str, **more: Any) -> None:
        if event in manager.callbacks:
            now = {"loss_dict": None, "grad_norm": None, "total_loss_dict": None, **more}
            manager.callbacks[event](SimpleNamespace(state=state, model=[model], optimizer=optimizer, **now))

    def evaluate() -> None:
        with torch.no_grad():
            per_iteration = checks.eval_global_batch_size // checks.eval_micro_batch_size
            sums = [forward_step_func(state, valid_batches, model) for _ in range(each * per_iteration)]
        loss, count = (torch.stack(part).sum() for part in zip(*sums, strict=True))
        tell("on_eval_end", total_loss_dict={"lm loss": loss / count})

    def save() -> None:
        if config.checkpoint.save:
            Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
            saved = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved["scheduler"] = scheduler.state_dict()
            torch.save(saved, Path(config.checkpoint.save, "latest_train_state.pt"))

    tell("on_train_start")
    for step in range(state.train_state.step + 1, train.train_iters + 1):
        tell("on_train_step_start")
        num_micro = size // train.micro_batch_size
        total = count = torch.zeros(())
        for _ in range(num_micro):
            loss, num_tokens = forward_step_func(state, batches, model)
            (loss / num_tokens / num_micro).backward()
            total, count = total + loss.detach(), count + num_tokens
        norm = torch.nn.utils.clip_grad_norm_(learns, options.clip_grad)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tell("on_train_step_end", loss_dict={"lm loss": total / count}, grad_norm=float(norm))
        state.train_state.step = step
        if checks.eval_interval and each and step % checks.eval_interval == 0:
            evaluate()
        if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
            save()
    save()
    tell("on_train_end")
    if each:
        evaluate()


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` has where the library is imported."""
    found = {name: ModuleType(name) for name in _PARTS}
    for name, values in _PARTS.items():
        for value in values:
            setattr(found[name], value, globals()[value])
    for name, module in found.items():
        owner, _, last = name.rpartition(".")
        if owner:
            setattr(found[owner], last, module)
    assert "megatron" not in sys.modules, "the library itself is here"
    return found


_PARTS: dict[str, tuple[str, ...]] = {
    "megatron": (),
    "megatron.bridge": ("AutoBridge",),
    "megatron.bridge.peft": (),
    "megatron.bridge.peft.lora": ("LoRA",),
    "megatron.bridge.training": (),
    "megatron.bridge.training.callbacks": ("CallbackManager",),
    "megatron.bridge.training.finetune": ("finetune",),
    "megatron.bridge.training.gpt_step": ("forward_step",),
    "megatron.bridge.training.tokenizers": (),
    "megatron.bridge.training.tokenizers.config": ("TokenizerConfig",),
    "megatron.bridge.training.config": (
        *("ConfigContainer", "TrainingConfig", "ValidationConfig", "OptimizerConfig", "SchedulerConfig"),
        *("DistributedDataParallelConfig", "LoggerConfig", "CheckpointConfig", "RNGConfig", "DatasetProvider"),
    ),
}
