"""Rules about `USE_MCA=1`, and those that it shares with `USE_MEGATRON_BRIDGE=1`: what Megatron-core computes in its
own way, or does not have."""

import os
from typing import Any

from luthier.config.keys.mcore import SIZES
from luthier.config.keys.sharding import uses_deepspeed, uses_fsdp
from luthier.config.keys.training import COMPILING
from luthier.config.rules.engine import (
    Condition,
    Rule,
    Rules,
    When,
    all_of,
    at_least,
    is_changed,
    is_given,
    is_turned_on,
)
from luthier.config.sections import is_on

_OWN_LAYERS = "changes the model of transformers, and Megatron-core computes with layers of its own"
_PACKS = "packs conversations that must not see each other, which Megatron-core does in its own way"
_OWN_STEP = "watches over luthier's own training step"


def under_mcore(run: Any) -> bool:
    return is_on(os.environ, "USE_MCA")


def _turned_on(library: str) -> dict[str, str]:
    """Key -> why it cannot be turned on where `library` trains."""
    own_loss = f"changes the loss, which {library} computes"
    no_answers = f"lets the model write answers, which {library} does not"
    return {
        **dict.fromkeys(
            ("enable_liger_kernel", "shift_attn", "use_unsloth", "use_kt", "mixture_of_depths", "train_from_scratch"),
            _OWN_LAYERS,
        ),
        **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"), _OWN_LAYERS),
        **dict.fromkeys(("neftune_noise_alpha", *COMPILING, "profile_modules", "fp8", "rope_scaling"), _OWN_LAYERS),
        **dict.fromkeys(
            ("use_dft_loss", "use_eaft_loss", "use_asft_loss", "label_smoothing_factor", "moe_aux_loss_coef"), own_loss
        ),
        **dict.fromkeys(("predict_with_generate", "do_predict", "eval_tasks"), no_answers),
        "compute_accuracy": f"needs predictions, and {library} returns the loss alone",
        "streaming": f"is not possible, since {library} reads a table of rows",
        "neat_packing": _PACKS,
        "load_best_model_at_end": "loads weights of transformers, and checkpoints have those of Megatron-core",
        "save_on_signal_seconds": _OWN_STEP,
    }


_REFUSED: tuple[tuple[str, str, Condition], ...] = (
    ("fsdp", "is another engine", uses_fsdp),
    ("deepspeed", "is another engine", uses_deepspeed),
    ("sp_size", "splits rows, which context_parallel_size does here", lambda run: run.parallel.sp_size > 1),
    ("tp_size", "splits layers, which tensor_model_parallel_size does here", lambda run: run.parallel.tp_size > 1),
    ("quantization_bit", _OWN_LAYERS, is_given("quantization", "quantization_bit")),
    ("packing", _PACKS, lambda run: run.stage == "sft" and bool(run.data.packing)),
    ("on_nonfinite", _OWN_STEP, is_changed("on_nonfinite")),
)


def megatron_rules(section: str, variable: str, library: str, trains: Condition) -> tuple[Rule, ...]:
    """The rules of a library that trains with Megatron-core: its section of keys, the environment variable that
    switches it on, its name, and whether a run uses it."""
    choose = f"leave it out, or unset {variable}"
    when = When(trains)
    return (
        *(at_least(section, key, 1) for key in (*SIZES, "virtual_pipeline_model_parallel_size")),
        at_least(section, "recompute_num_layers", 1),
        Rule(
            ("sequence_parallel", "tensor_model_parallel_size"),
            "shares the work of processes that share layers, and there are none",
            "set tensor_model_parallel_size above 1, or leave it out",
            lambda run: (
                getattr(run, section).sequence_parallel and getattr(run, section).tensor_model_parallel_size == 1
            ),
        ),
        Rule(
            (variable,),
            "both Ray and torchrun would start the processes",
            f"unset one of {variable} and USE_RAY",
            all_of(trains, lambda run: is_on(os.environ, "USE_RAY")),
            file="environment",
        ),
        when.refuses(
            ("stage",),
            f"is not trained by {library} here, only pt and sft are",
            f"use one of them, or unset {variable}",
            lambda run: run.stage not in ("pt", "sft"),
        ),
        *(when.refuses((key,), reason, choose, is_turned_on(key)) for key, reason in _turned_on(library).items()),
        *(when.refuses((key,), reason, choose, asks) for key, reason, asks in _REFUSED),
    )


_mcore = When(under_mcore)
MCORE_RULES = Rules(
    (
        *megatron_rules("mcore", "USE_MCA", "mcore_adapter", under_mcore),
        _mcore.refuses(
            ("finetuning_type",),
            "is not there with mcore_adapter, which trains whole models",
            "set finetuning_type: full, or unset USE_MCA",
            lambda run: run.finetuning_type != "full",
        ),
        _mcore.refuses(
            ("optim",),
            "is not read, since the key optimizer chooses that of Megatron-core",
            "leave it out, or unset USE_MCA",
            is_changed("optim"),
        ),
    )
)
