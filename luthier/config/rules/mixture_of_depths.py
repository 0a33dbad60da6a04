"""Rules about `mixture_of_depths`."""

from typing import Any

from luthier.config.keys.quantization import shards_weights
from luthier.config.rules.engine import Rule, Rules, When, all_of, is_given, is_set
from luthier.core.kinds import STAGES


def _converts(run: Any) -> bool:
    return run.model.mixture_of_depths == "convert"


_with_routers = When(is_given("model", "mixture_of_depths"))
_UNTRAINED = "the routers of a converted model are untrained, so only training converts"
_LOAD = "set mixture_of_depths: load and name a model that was trained so"

DENSE_RULES = Rules((Rule(("mixture_of_depths",), _UNTRAINED, _LOAD, _converts),))
"""For the commands that do not train."""

DEPTH_RULES = Rules(
    (
        Rule(("mixture_of_depths", "do_train"), _UNTRAINED, _LOAD, all_of(_converts, lambda run: not run.trains)),
        Rule(
            ("mixture_of_depths", "finetuning_type"),
            "the new routers must be trained together with the blocks, and an adapter holds no routers",
            "set finetuning_type: full; a model that was trained so takes lora or freeze with mixture_of_depths: load",
            lambda run: _converts(run) and run.finetuning_type != "full",
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "stage"),
            "while training, tokens are chosen among those of the whole text, which is defined for the loss of pt and"
            " sft only; other stages compare the model with one that is not training",
            "set stage: pt or sft",
            lambda run: not STAGES.get(run.stage).supports_skipped_tokens,
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "quantization_bit"),
            "blocks that skip tokens must be trained, and quantized weights cannot be",
            "leave quantization_bit out",
            is_given("quantization", "quantization_bit"),
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "shift_attn"),
            "counts the tokens that pass a router, and shift_attn counts those of the text",
            "leave one of the two out",
            is_set("model", "shift_attn"),
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "flash_attn"),
            "needs attention that does not attend across samples, and plain attention does",
            "leave flash_attn: disabled out",
            lambda run: run.model.flash_attn == "disabled",
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "moe_aux_loss_coef"),
            "the balance loss counts every token in every block",
            "leave moe_aux_loss_coef out",
            is_given("model", "moe_aux_loss_coef"),
        ),
        _with_routers.refuses(
            ("mixture_of_depths", "fsdp", "deepspeed"),
            "changes the blocks of a whole model, and FSDP and ZeRO-3 shard its weights",
            "leave fsdp and ZeRO-3 out",
            shards_weights,
        ),
    )
)
"""For training."""
