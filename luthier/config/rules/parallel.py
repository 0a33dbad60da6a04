"""Rules about `sp_size`: what a process cannot compute that has a part of each sequence only."""

from collections.abc import Mapping
from typing import Any

from luthier.config.keys.training import COMPILING
from luthier.config.rules.engine import Condition, Rules, When, at_least, is_given, is_set

_CHOOSE = "leave it out, or leave sp_size out"
SPLITS = When(lambda run: run.parallel.sp_size > 1)


def dispatches_batches(run: Any) -> bool:
    """Whether one process reads all batches and sends the others theirs."""
    asked = run.training["accelerator_config"]
    return isinstance(asked, Mapping) and bool(asked.get("dispatch_batches"))


_REFUSED: tuple[tuple[str, str, Condition], ...] = (
    ("streaming", "gives each process rows of its own, and sp_size lets them share rows", is_set("data", "streaming")),
    (
        "accelerator_config",
        "lets one process read all batches, and sp_size lets each read its part",
        dispatches_batches,
    ),
    (
        "train_sampling_strategy",
        "gives each process rows of its own, and sp_size lets them share rows",
        lambda run: run.training["train_sampling_strategy"] == "batch_rebalance",
    ),
    *((key, "cannot trace the exchange of tokens between processes", is_set("training", key)) for key in COMPILING),
    (
        "neftune_noise_alpha",
        "scales its noise by the length of a whole sequence",
        is_set("training", "neftune_noise_alpha"),
    ),
    ("shift_attn", "replaces the attention that sp_size needs", is_set("features.shifted_attention", "shift_attn")),
    ("use_unsloth", "replaces the attention that sp_size needs", is_set("model", "use_unsloth")),
    (
        "mixture_of_depths",
        "chooses among the tokens of a whole sequence",
        is_given("features.mixture_of_depths", "mixture_of_depths"),
    ),
    (
        "moe_aux_loss_coef",
        "balances experts over the tokens of a whole batch",
        is_given("features.router_balance", "moe_aux_loss_coef"),
    ),
)

PARALLEL_RULES = Rules(
    (
        at_least("parallel", "sp_size", 1),
        SPLITS.refuses(
            ("sp_size", "stage"),
            "splits sequences, and the loss of this stage needs whole ones",
            "use stage: pt or sft, or leave it out",
            lambda run: run.stage not in ("pt", "sft"),
        ),
        SPLITS.refuses(
            ("flash_attn", "sp_size"),
            "chooses a kernel, and sp_size computes attention with the one of PyTorch",
            "set flash_attn: auto",
            lambda run: run.model.flash_attn not in ("auto", "sdpa"),
        ),
        *(SPLITS.refuses((key, "sp_size"), reason, _CHOOSE, asks) for key, reason, asks in _REFUSED),
    )
)
