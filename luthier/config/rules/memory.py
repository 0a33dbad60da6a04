"""Rules about the keys that change how a model computes in training: experts, attention, recomputation."""

from luthier.config.keys.quantization import zero_stage
from luthier.config.rules.engine import (
    Rule,
    Rules,
    When,
    all_of,
    at_least,
    is_changed,
    is_given,
    is_other_than,
    is_set,
    not_,
    warning,
)
from luthier.core.kinds import STAGES
from luthier.core.versions import is_installed

_offloads_activations = When(is_set("model", "use_unsloth_gc"))


def _recomputes_nothing(key: str, default: object) -> Rule:
    return Rule(
        (key, "disable_gradient_checkpointing"),
        "changes how layers are recomputed, and disable_gradient_checkpointing recomputes none",
        "set one of the two",
        all_of(is_set("model", "disable_gradient_checkpointing"), is_other_than("model", key, default)),
    )


MEMORY_RULES = Rules(
    (
        at_least("model", "moe_aux_loss_coef", 0),
        warning(
            ("moe_aux_loss_coef", "stage"),
            "is added to the loss of the stages pt, sft and gkd only",
            "leave it out",
            lambda run: run.model.moe_aux_loss_coef is not None and not STAGES.get(run.stage).supports_router_loss,
        ),
        warning(
            ("flash_attn", "shift_attn"),
            "is not read, since shift_attn has kernels of its own",
            "leave it out",
            all_of(is_set("model", "shift_attn"), is_other_than("model", "flash_attn", "auto")),
        ),
        Rule(
            ("pure_bf16", "deepspeed"),
            "holds the weights in bfloat16 alone, and ZeRO-3 keeps a copy of its shards in float32",
            "set bf16: true instead, or take ZeRO-2",
            lambda run: run.finetuning.pure_bf16 and zero_stage(run) == 3,
        ),
        Rule(
            ("enable_liger_kernel",),
            "needs the library liger-kernel, which is not installed",
            "pip install liger-kernel",
            lambda run: run.model.enable_liger_kernel and not is_installed("liger_kernel"),
        ),
        warning(
            ("offload_folder", "do_train"),
            "is not read here, since trainable weights stay in memory",
            "leave it out, and see use_unsloth_gc and quantization_bit to train with less memory",
            all_of(is_changed("offload_folder"), lambda run: run.trains),
        ),
        at_least("model", "checkpoint_every", 1),
        _recomputes_nothing("use_unsloth_gc", False),
        _recomputes_nothing("checkpoint_every", 1),
        _offloads_activations.refuses(
            ("use_unsloth_gc", "fsdp"),
            "uses reentrant checkpointing, which FSDP cannot follow",
            "leave it out",
            is_set("training", "fsdp"),
        ),
        _offloads_activations.refuses(
            ("use_unsloth_gc", "moe_aux_loss_coef"),
            "uses reentrant checkpointing, in which the routers of experts get no gradient",
            "leave one of the two out",
            is_given("model", "moe_aux_loss_coef"),
        ),
        _offloads_activations.warns(
            ("use_unsloth_gc", "use_reentrant_gc"),
            "uses reentrant checkpointing, whatever use_reentrant_gc says",
            "leave use_reentrant_gc out",
            not_(is_set("model", "use_reentrant_gc")),
        ),
    )
)
