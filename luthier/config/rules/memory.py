"""Rules about the keys that change how a model computes in training: experts, attention, recomputation."""

from luthier.config.keys.quantization import zero_stage
from luthier.config.rules.engine import Rule, Rules, at_least

MEMORY_RULES = Rules(
    (
        Rule(
            ("pure_bf16", "deepspeed"),
            "holds the weights in bfloat16 alone, and ZeRO-3 keeps a copy of what it shares out in float32",
            "set bf16: true in its place, or take ZeRO-2",
            lambda run: run.finetuning.pure_bf16 and zero_stage(run) == 3,
        ),
        Rule(
            ("offload_folder", "do_train"),
            "is not read here, since weights that learn stay in memory",
            "leave it out, and see use_unsloth_gc and quantization_bit to train with less memory",
            lambda run: run.trains and "offload_folder" in run.changed,
            only_warns=True,
        ),
        at_least("model", "checkpoint_every", 1),
        *(
            Rule(
                (key, "disable_gradient_checkpointing"),
                "changes how layers are recomputed, and disable_gradient_checkpointing recomputes none",
                "set one of the two",
                lambda run, key=key, default=default: (  # type: ignore[misc]
                    run.model.disable_gradient_checkpointing and getattr(run.model, key) != default
                ),
            )
            for key, default in (("use_unsloth_gc", False), ("checkpoint_every", 1))
        ),
        Rule(
            ("use_unsloth_gc", "fsdp"),
            "recomputes layers in the reentrant way, which FSDP cannot follow",
            "leave it out",
            lambda run: run.model.use_unsloth_gc and bool(run.training["fsdp"]),
        ),
        Rule(
            ("use_unsloth_gc", "use_reentrant_gc"),
            "recomputes layers in the reentrant way, whatever use_reentrant_gc says",
            "leave use_reentrant_gc out",
            lambda run: run.model.use_unsloth_gc and not run.model.use_reentrant_gc,
            only_warns=True,
        ),
    )
)
