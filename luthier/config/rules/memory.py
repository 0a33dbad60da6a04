"""Rules about the keys that save memory in training: number types, recomputation, offloading."""

from luthier.config.keys.sharding import zero_stage
from luthier.config.rules.engine import (
    Rule,
    Rules,
    When,
    all_of,
    at_least,
    is_changed,
    is_other_than,
    is_set,
    not_,
    warning,
)

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
        Rule(
            ("pure_bf16", "deepspeed"),
            "holds the weights in bfloat16 alone, and ZeRO-3 keeps a copy of its shards in float32",
            "set bf16: true instead, or take ZeRO-2",
            lambda run: run.finetuning.pure_bf16 and zero_stage(run) == 3,
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
        _offloads_activations.warns(
            ("use_unsloth_gc", "use_reentrant_gc"),
            "uses reentrant checkpointing, whatever use_reentrant_gc says",
            "leave use_reentrant_gc out",
            not_(is_set("model", "use_reentrant_gc")),
        ),
    )
)
