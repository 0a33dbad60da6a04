"""What `use_unsloth` demands and what it excludes. The library loads, adapts and computes a model in its own way."""

from typing import Any

from luthier.config.keys.quantization import GROWING_KEYS, shards_weights
from luthier.config.rules.engine import Rule, Rules
from luthier.core.versions import is_installed

INSTALL = "pip install --no-deps unsloth unsloth_zoo, with the libraries that docs/models.md names"
"""Without `--no-deps` pip would put an older transformers in the place of the one that luthier needs."""

_OWN_WAY = {
    "flash_attn": "the attention",
    "enable_liger_kernel": "the kernels",
    "upcast_layernorm": "the number formats",
    "upcast_lmhead_output": "the number formats",
    "checkpoint_every": "the recomputation of layers",
    "use_reentrant_gc": "the recomputation of layers",
}
"""Key -> what unsloth settles by itself."""


def _excludes(keys: tuple[str, ...], reason: str, remedy: str, broken: Any) -> Rule:
    return Rule(keys, reason, remedy, lambda run: run.model.use_unsloth and broken(run))


def _is_lora_scorer(run: Any) -> bool:
    return run.stage == "ppo" and run.method.reward_model_type == "lora"


UNSLOTH_RULES = Rules(
    (
        _excludes(
            ("use_unsloth",),
            "needs the library unsloth, which is not installed (and a GPU)",
            f"{INSTALL}; or leave it out",
            lambda run: not is_installed("unsloth"),
        ),
        _excludes(
            ("adapter_name_or_path", "use_unsloth"),
            "unsloth puts one adapter beside the model and merges none",
            "merge them with `luthier export`, and give its folder as model_name_or_path",
            lambda run: len(run.model.adapter_name_or_path) > 1,
        ),
        _excludes(
            ("rope_scaling", "use_unsloth"),
            "unsloth stretches positions in a way of its own",
            "leave one of the two out",
            lambda run: run.features.rope_scaling.rope_scaling is not None,
        ),
        _excludes(
            ("mixture_of_depths", "use_unsloth"),
            "unsloth knows no routers between blocks",
            "leave one of the two out",
            lambda run: run.features.mixture_of_depths.mixture_of_depths is not None,
        ),
        _excludes(
            ("model_name_or_path", "use_unsloth"),
            "unsloth trains no GGUF files",
            "give the folder of the model that the file was made from",
            lambda run: run.model.model_name_or_path.lower().endswith(".gguf"),
        ),
        _excludes(
            ("quantization_bit", "use_unsloth"),
            "unsloth quantizes by bitsandbytes, to 4 or 8 bits",
            "set quantization_method: bnb and quantization_bit: 4",
            lambda run: (
                run.quantization.quantization_bit is not None
                and (run.quantization.quantization_method != "bnb" or run.quantization.quantization_bit not in (4, 8))
            ),
        ),
        _excludes(
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
        _excludes(
            ("use_unsloth", "deepspeed", "fsdp"),
            "keeps a whole model on each device, and ZeRO-3 and FSDP share it out",
            "leave one of the two out, or take ZeRO-2",
            shards_weights,
        ),
        _excludes(
            ("use_unsloth", "stage"),
            "loads models that write, and a reward model gives scores",
            "leave it out",
            lambda run: run.stage == "rm",
        ),
        _excludes(
            ("reward_model_type", "use_unsloth"),
            "unsloth cannot put the adapter of a reward model on the policy",
            "set reward_model_type: full, or leave use_unsloth out",
            _is_lora_scorer,
        ),
        *(
            _excludes(
                (key, "use_unsloth"),
                "changes a model in a way that unsloth's own forward functions do not know",
                "leave one of the two out",
                lambda run, key=key: bool(run.given.get(key)),
            )
            for key in ("shift_attn", "train_from_scratch", *GROWING_KEYS)
        ),
        _excludes(
            ("moe_aux_loss_coef", "use_unsloth"),
            "unsloth's forward functions do not give what the routers said",
            "leave one of the two out",
            lambda run: run.features.router_balance.moe_aux_loss_coef is not None,
        ),
        *(
            _excludes(
                (key, "use_unsloth"),
                "starts or places the adapter in a way that unsloth does not have",
                "leave one of the two out",
                lambda run, key=key: run.finetuning_type == "lora" and bool(getattr(run.adapter, key)),
            )
            for key in ("pissa_init", "loftq_init", "use_llama_pro", "create_new_adapter")
        ),
        *(
            Rule(
                (key, "use_unsloth"),
                f"is not read here, since unsloth settles {what} by itself",
                "leave it out",
                lambda run, key=key: run.model.use_unsloth and key in run.changed,  # type: ignore[misc]
                only_warns=True,
            )
            for key, what in _OWN_WAY.items()
        ),
    )
)

UNSLOTH_EXPORT_RULES = Rules(
    (
        Rule(
            ("use_unsloth",),
            "is not read here, since adapters are merged into the weights as they are in the file",
            "leave it out",
            lambda run: run.model.use_unsloth,
            only_warns=True,
        ),
    )
)
