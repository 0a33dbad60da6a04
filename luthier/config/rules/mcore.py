"""Rules about `USE_MCA=1`: what Megatron-core computes in its own way, or does not have."""

import os
from typing import Any

from luthier.config.keys.mcore import SIZES
from luthier.config.keys.sharding import uses_fsdp
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

_CHOOSE = "leave it out, or unset USE_MCA"
_OWN_LAYERS = "changes the model of transformers, and Megatron-core computes with layers of its own"
_OWN_LOSS = "changes the loss, which mcore_adapter computes"
_NO_ANSWERS = "lets the model write answers, which mcore_adapter does not"
_OWN_STEP = "watches over luthier's own training step"


def under_mcore(run: Any) -> bool:
    return is_on(os.environ, "USE_MCA")


_mcore = When(under_mcore)
_ON = {
    **dict.fromkeys(
        ("enable_liger_kernel", "shift_attn", "use_unsloth", "use_kt", "mixture_of_depths", "train_from_scratch"),
        _OWN_LAYERS,
    ),
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"), _OWN_LAYERS),
    **dict.fromkeys(("neftune_noise_alpha", "torch_compile", "profile_modules", "fp8", "rope_scaling"), _OWN_LAYERS),
    **dict.fromkeys(
        ("use_dft_loss", "use_eaft_loss", "use_asft_loss", "label_smoothing_factor", "moe_aux_loss_coef"), _OWN_LOSS
    ),
    **dict.fromkeys(("predict_with_generate", "do_predict", "eval_tasks"), _NO_ANSWERS),
    "compute_accuracy": "needs predictions, and mcore_adapter returns the loss alone",
    "streaming": "is not possible, since mcore_adapter reads a table of rows",
    "neat_packing": "packs conversations that must not see each other, which Megatron-core does in its own way",
    "load_best_model_at_end": "loads weights of transformers, and checkpoints have those of Megatron-core",
    "deepspeed": "is another engine",
    "save_on_signal_seconds": _OWN_STEP,
}
"""Key -> why it cannot be turned on."""
_REFUSED: tuple[tuple[str, str, Condition], ...] = (
    ("fsdp", "is another engine", uses_fsdp),
    ("sp_size", "splits rows, which context_parallel_size does here", lambda run: run.parallel.sp_size > 1),
    ("tp_size", "splits layers, which tensor_model_parallel_size does here", lambda run: run.parallel.tp_size > 1),
    ("quantization_bit", _OWN_LAYERS, is_given("quantization", "quantization_bit")),
    (
        "packing",
        "packs conversations that must not see each other, which Megatron-core does in its own way",
        lambda run: run.stage == "sft" and bool(run.data.packing),
    ),
    ("optim", "is not read, since the key optimizer chooses that of Megatron-core", is_changed("optim")),
    ("on_nonfinite", _OWN_STEP, is_changed("on_nonfinite")),
)

MCORE_RULES = Rules(
    (
        *(at_least("mcore", key, 1) for key in (*SIZES, "virtual_pipeline_model_parallel_size")),
        at_least("mcore", "recompute_num_layers", 1),
        Rule(
            ("sequence_parallel", "tensor_model_parallel_size"),
            "shares the work of processes that share layers, and there are none",
            "set tensor_model_parallel_size above 1, or leave it out",
            lambda run: run.mcore.sequence_parallel and run.mcore.tensor_model_parallel_size == 1,
        ),
        Rule(
            ("USE_MCA",),
            "both Ray and torchrun would start the processes",
            "unset one of USE_MCA and USE_RAY",
            all_of(under_mcore, lambda run: is_on(os.environ, "USE_RAY")),
            file="environment",
        ),
        _mcore.refuses(
            ("stage",),
            "is not trained by Megatron-core here, only pt and sft are",
            "use one of them, or unset USE_MCA",
            lambda run: run.stage not in ("pt", "sft"),
        ),
        _mcore.refuses(
            ("finetuning_type",),
            "is not there with Megatron-core, which trains whole models",
            "set finetuning_type: full, or unset USE_MCA",
            lambda run: run.finetuning_type != "full",
        ),
        *(_mcore.refuses((key,), reason, _CHOOSE, is_turned_on(key)) for key, reason in _ON.items()),
        *(_mcore.refuses((key,), reason, _CHOOSE, asks) for key, reason, asks in _REFUSED),
    )
)
