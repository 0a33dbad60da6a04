"""Rules about the model, its adapters and its new tokens. They hold for every command."""

from dataclasses import asdict
from typing import Any

from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_set, merged_once, not_
from luthier.core.kinds import ADAPTERS


def trains_adapter(run: Any) -> bool:
    """Whether the finetuning type adds weights beside the model, as LoRA and OFT do."""
    return ADAPTERS.get(run.finetuning_type).adds_weights


def scores_with_adapter(run: Any) -> bool:
    """Whether the reward model of a training run is an adapter on the policy's own base (ppo and grpo)."""
    keys = asdict(run.method)
    return keys.get("reward_model") is not None and keys["reward_model_type"] == "lora"


MODEL_RULES = Rules(
    (
        Rule(
            ("model_name_or_path",),
            "is empty",
            "name a folder, a .gguf file or a model of the hub",
            not_(is_set("model", "model_name_or_path")),
        ),
        Rule(
            ("adapter_name_or_path", "finetuning_type"),
            "adapters are loaded by finetuning_type: lora or oft only",
            "set the one that the adapter was trained with, or leave the adapters out",
            all_of(is_set("model", "adapter_name_or_path"), not_(trains_adapter)),
        ),
        merged_once("model", "adapter_name_or_path"),
        at_least("data", "cutoff_len", 1),
    )
)
