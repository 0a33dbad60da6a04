"""What a mixture of depths (`mixture_of_depths`) does not go together with."""

from typing import Any

from luthier.config.keys.quantization import shards_weights
from luthier.config.rules.engine import Rule, Rules


def _converts(run: Any) -> bool:
    return run.model.mixture_of_depths == "convert"


def _is_routed(run: Any) -> bool:
    return run.model.mixture_of_depths is not None


DENSE_RULES = Rules(
    (
        Rule(
            ("mixture_of_depths",),
            "a converted model has learned nothing yet, so only training converts",
            "set mixture_of_depths: load and name a model that was trained so",
            _converts,
        ),
    )
)
"""For the commands that do not train."""

DEPTH_RULES = Rules(
    (
        Rule(
            ("mixture_of_depths", "do_train"),
            "a converted model has learned nothing yet, so only training converts",
            "set mixture_of_depths: load and name a model that was trained so",
            lambda run: _converts(run) and not run.trains,
        ),
        Rule(
            ("mixture_of_depths", "finetuning_type"),
            "the fresh routers must learn together with the blocks, and an adapter holds no routers",
            "set finetuning_type: full; a model that was trained so takes lora or freeze with mixture_of_depths: load",
            lambda run: _converts(run) and run.finetuning_type != "full",
        ),
        Rule(
            ("mixture_of_depths", "stage"),
            "while it trains, tokens are chosen among those of the whole text, which is defined for the loss of pt and"
            " sft only; other stages compare the model with one that is not training",
            "set stage: pt or sft",
            lambda run: _is_routed(run) and run.stage not in ("pt", "sft"),
        ),
        Rule(
            ("mixture_of_depths", "quantization_bit"),
            "blocks that skip tokens have to learn",
            "leave quantization_bit out",
            lambda run: _is_routed(run) and run.quantization.quantization_bit is not None,
        ),
        Rule(
            ("mixture_of_depths", "shift_attn"),
            "counts tokens that pass, and shift_attn those of the text",
            "leave one of the two out",
            lambda run: _is_routed(run) and run.model.shift_attn,
        ),
        Rule(
            ("mixture_of_depths", "flash_attn"),
            "needs attention that keeps texts apart, which plain attention does not",
            "leave flash_attn: disabled out",
            lambda run: _is_routed(run) and run.model.flash_attn == "disabled",
        ),
        Rule(
            ("mixture_of_depths", "moe_aux_loss_coef"),
            "the balance loss counts every token in every block",
            "leave moe_aux_loss_coef out",
            lambda run: _is_routed(run) and run.model.moe_aux_loss_coef is not None,
        ),
        Rule(
            ("mixture_of_depths", "fsdp", "deepspeed"),
            "changes the blocks of a whole model, and FSDP and ZeRO-3 share out its weights",
            "leave fsdp and ZeRO-3 out",
            lambda run: _is_routed(run) and shards_weights(run),
        ),
    )
)
"""For training."""
