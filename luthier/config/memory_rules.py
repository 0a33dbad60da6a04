"""Rules about the keys that change how a model computes in training: experts, attention, recomputation."""

from luthier.config.rules import Rule, Rules, at_least

MEMORY_RULES = Rules(
    (
        at_least("model", "moe_aux_loss_coef", 0),
        Rule(
            ("moe_aux_loss_coef", "stage"),
            "is added to the loss of the stages pt and sft only",
            "leave it out",
            lambda run: run.model.moe_aux_loss_coef is not None and run.stage not in ("pt", "sft"),
            only_warns=True,
        ),
    )
)
