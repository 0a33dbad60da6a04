"""Rules about `tp_size`: what a run cannot do whose processes hold a part of each layer only."""

from typing import Any

from luthier.config.keys.sharding import deepspeed_settings, settings_of, uses_deepspeed, uses_fsdp
from luthier.config.keys.training import COMPILING
from luthier.config.rules.engine import Condition, Rule, Rules, When, at_least, is_given, is_turned_on
from luthier.config.rules.parallel import dispatches_batches

_CHOOSE = "leave it out, or leave tp_size out"
_TRIED_OPTIMS = ("adamw_torch", "adamw_torch_fused", "sgd")
_splits = When(lambda run: run.parallel.tp_size > 1)


_OWN_ROWS = "gives each process rows of its own, and all processes of tp_size compute the same rows"
_TAKES_WHOLE = "takes weights as a whole, and tp_size splits them as they are read"
_RUNS_ALONE = "lets each process write answers to rows of its own, and with tp_size no process has a whole model"
_ON = {
    "streaming": _OWN_ROWS,
    **dict.fromkeys(COMPILING, "cannot trace the exchange between processes"),
    "predict_with_generate": _RUNS_ALONE,
    "do_predict": _RUNS_ALONE,
    "eval_tasks": _RUNS_ALONE,
    "use_asft_loss": "compares with a second model, which would have to be split too",
    "enable_liger_kernel": _TAKES_WHOLE,
    "shift_attn": "replaces the attention of the model",
    "use_unsloth": _TAKES_WHOLE,
    "use_kt": _TAKES_WHOLE,
    "fp8": _TAKES_WHOLE,
    "train_from_scratch": _TAKES_WHOLE,
    "mixture_of_depths": _TAKES_WHOLE,
    "moe_aux_loss_coef": "listens to routers, which tp_size may have split",
    "resize_vocab": _TAKES_WHOLE,
    "add_tokens": _TAKES_WHOLE,
    "add_special_tokens": _TAKES_WHOLE,
    "new_special_tokens_config": _TAKES_WHOLE,
    "adapter_name_or_path": _TAKES_WHOLE,
    "additional_target": _TAKES_WHOLE,
    "use_dora": _TAKES_WHOLE,
    "pissa_init": _TAKES_WHOLE,
    "use_llama_pro": _TAKES_WHOLE,
}
"""Key -> why it cannot be turned on."""
_REFUSED: tuple[tuple[str, str, Condition], ...] = (
    ("sp_size", "splits rows, and tp_size splits layers", lambda run: run.parallel.sp_size > 1),
    ("fsdp", "shards the weights that tp_size splits already", uses_fsdp),
    ("deepspeed", "lays out the weights that tp_size splits already", uses_deepspeed),
    ("quantization_bit", _TAKES_WHOLE, is_given("quantization", "quantization_bit")),
    (
        "on_nonfinite",
        "goes back to a checkpoint (rollback), which has not been tried with split layers",
        lambda run: run.recovery.on_nonfinite == "rollback",
    ),
    ("accelerator_config", "lets one process read all batches, and with tp_size each reads them", dispatches_batches),
    (
        "train_sampling_strategy",
        _OWN_ROWS,
        lambda run: run.training["train_sampling_strategy"] == "batch_rebalance",
    ),
)


def _splits_in_deepspeed(run: Any) -> bool:
    """DeepSpeed would replace layers after the fast kernels have been put in, which compute with whole weights."""
    size = settings_of(deepspeed_settings(run), "tensor_parallel").get("autotp_size")
    return isinstance(size, int) and size > 1


TENSOR_PARALLEL_RULES = Rules(
    (
        Rule(
            ("deepspeed",),
            "splits layers (tensor_parallel), which this version does by itself",
            "leave tensor_parallel out of it, or leave deepspeed out and set tp_size to the number of devices",
            _splits_in_deepspeed,
            for_rows=False,
        ),
        at_least("parallel", "tp_size", 1),
        _splits.refuses(
            ("tp_size", "stage"),
            "is there for stage: pt and sft only",
            "use one of them, or leave it out",
            lambda run: run.stage not in ("pt", "sft"),
        ),
        _splits.refuses(
            ("tp_size", "finetuning_type"),
            "is there for finetuning_type: full and lora only",
            "use one of them, or leave it out",
            lambda run: run.finetuning_type not in ("full", "lora"),
        ),
        _splits.refuses(
            ("optim", "tp_size"),
            "works on whole matrices",
            f"use {' or '.join(_TRIED_OPTIMS)}, or leave tp_size out",
            lambda run: bool(run.optimizers) or run.training["optim"] not in _TRIED_OPTIMS,
        ),
        *(_splits.refuses((key, "tp_size"), reason, _CHOOSE, is_turned_on(key)) for key, reason in _ON.items()),
        *(_splits.refuses((key, "tp_size"), reason, _CHOOSE, asks) for key, reason, asks in _REFUSED),
    )
)
