"""Rules about `use_unsloth`: what unsloth needs, and what it does not go together with."""

from typing import Any

from luthier.config.keys.quantization import GROWING_KEYS
from luthier.config.keys.sharding import shards_weights
from luthier.config.rules.engine import (
    Rules,
    When,
    all_of,
    is_changed,
    is_given,
    is_set,
    is_turned_on,
    missing_library,
    warning,
)
from luthier.config.rules.model import scores_with_adapter
from luthier.core.kinds import STAGES
from luthier.core.versions import is_installed

INSTALL = "pip install --no-deps unsloth unsloth_zoo, with the libraries that docs/models.md names"
"""Without `--no-deps` pip would replace transformers by an older version than luthier needs."""

_OWN_WAY = {
    "flash_attn": "the attention",
    "enable_liger_kernel": "the kernels",
    "upcast_layernorm": "the number formats",
    "upcast_lmhead_output": "the number formats",
    "checkpoint_every": "the recomputation of layers",
    "use_reentrant_gc": "the recomputation of layers",
}
"""Key -> what unsloth decides by itself."""


_uses_unsloth = is_set("model", "use_unsloth")
_with_unsloth = When(_uses_unsloth)


def _trains_lora(run: Any) -> bool:
    return run.finetuning_type == "lora"


def _cannot_quantize(run: Any) -> bool:
    keys = run.quantization
    return keys.quantization_bit is not None and (
        keys.quantization_method != "bnb" or keys.quantization_bit not in (4, 8)
    )


UNSLOTH_RULES = Rules(
    (
        missing_library(
            "use_unsloth",
            "unsloth",
            f"{INSTALL}, on a machine with a GPU; or leave it out",
            all_of(_uses_unsloth, lambda run: not is_installed("unsloth")),
        ),
        _with_unsloth.refuses(
            ("adapter_name_or_path", "use_unsloth"),
            "unsloth takes one adapter and merges none",
            "merge them with `luthier export`, and give its folder as model_name_or_path",
            lambda run: len(run.model.adapter_name_or_path) > 1,
        ),
        _with_unsloth.refuses(
            ("rope_scaling", "use_unsloth"),
            "unsloth scales positions in a way of its own",
            "leave one of the two out",
            is_given("features.rope_scaling", "rope_scaling"),
        ),
        _with_unsloth.refuses(
            ("mixture_of_depths", "use_unsloth"),
            "unsloth knows no routers between blocks",
            "leave one of the two out",
            is_given("features.mixture_of_depths", "mixture_of_depths"),
        ),
        _with_unsloth.refuses(
            ("model_name_or_path", "use_unsloth"),
            "unsloth trains no GGUF files",
            "give the folder of the model that the file was made from",
            lambda run: run.model.model_name_or_path.lower().endswith(".gguf"),
        ),
        _with_unsloth.refuses(
            ("quantization_bit", "use_unsloth"),
            "unsloth quantizes by bitsandbytes, to 4 or 8 bits",
            "set quantization_method: bnb and quantization_bit: 4",
            _cannot_quantize,
        ),
        _with_unsloth.refuses(
            ("finetuning_type", "use_unsloth"),
            "unsloth trains LoRA adapters or the whole model",
            "set finetuning_type: lora or full, or leave use_unsloth out",
            lambda run: run.finetuning_type not in ("lora", "full"),
        ),
    )
)
"""For the commands that compute with a model."""

UNSLOTH_TRAINING_RULES = Rules(
    (
        _with_unsloth.refuses(
            ("use_unsloth", "deepspeed", "fsdp"),
            "keeps a whole model on each device, and ZeRO-3 and FSDP shard it",
            "leave one of the two out, or take ZeRO-2",
            shards_weights,
        ),
        _with_unsloth.refuses(
            ("use_unsloth", "stage"),
            "loads language models, and a reward model has a head that gives scores",
            "leave it out",
            lambda run: STAGES.get(run.stage).head == "score",
        ),
        _with_unsloth.refuses(
            ("reward_model_type", "use_unsloth"),
            "unsloth cannot put the adapter of a reward model on the policy",
            "set reward_model_type: full, or leave use_unsloth out",
            scores_with_adapter,
        ),
        *(
            _with_unsloth.refuses(
                (key, "use_unsloth"),
                "changes a model in a way that unsloth's own forward functions do not know",
                "leave one of the two out",
                is_turned_on(key),
            )
            for key in ("shift_attn", "train_from_scratch", *GROWING_KEYS)
        ),
        _with_unsloth.refuses(
            ("moe_aux_loss_coef", "use_unsloth"),
            "unsloth's forward functions do not return the router logits",
            "leave one of the two out",
            is_given("features.router_balance", "moe_aux_loss_coef"),
        ),
        *(
            _with_unsloth.refuses(
                (key, "use_unsloth"),
                "starts or places the adapter in a way that unsloth does not have",
                "leave one of the two out",
                all_of(_trains_lora, is_set("adapter", key)),
            )
            for key in ("pissa_init", "loftq_init", "use_llama_pro", "create_new_adapter")
        ),
        *(
            _with_unsloth.warns(
                (key, "use_unsloth"),
                f"is not read here, since unsloth decides {what} by itself",
                "leave it out",
                is_changed(key),
            )
            for key, what in _OWN_WAY.items()
        ),
    )
)

UNSLOTH_EXPORT_RULES = Rules(
    (
        warning(
            ("use_unsloth",),
            "is not read here, since adapters are merged into the weights as they are in the file",
            "leave it out",
            is_set("model", "use_unsloth"),
        ),
    )
)
