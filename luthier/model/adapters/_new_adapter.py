"""A fresh adapter of peft on a model, whatever its method."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, all_of, is_given, is_set, not_, value_of, warning
from luthier.core.errors import ModelError
from luthier.model.classes import SCORE_TASK, gives_scores
from luthier.model.compat.peft_split_layers import whole_adapters
from luthier.model.modules import require_modules

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def target_rules(key: str) -> tuple[Rule, ...]:
    """Rules about a key that names what gets the adapter."""
    targets = value_of("adapter", key)
    return (
        Rule(
            (key,),
            "names no module",
            f"write {key}: all, or names such as q_proj,v_proj",
            not_(is_set("adapter", key)),
        ),
        Rule(
            (key,),
            "is what peft calls it, and here it is called all",
            f"write {key}: all",
            lambda run: "all-linear" in targets(run),
        ),
    )


_creates = is_set("adapter", "create_new_adapter")

NEW_ADAPTER_RULES = (
    *target_rules("lora_target"),
    Rule(
        ("create_new_adapter", "adapter_name_or_path", "quantization_bit"),
        "the given adapter would have to be merged into quantized weights",
        "merge it into the original model with `luthier export`, and give its folder as model_name_or_path",
        all_of(_creates, is_set("model", "adapter_name_or_path"), is_given("quantization", "quantization_bit")),
    ),
    warning(
        ("create_new_adapter", "adapter_name_or_path"),
        "merges the given adapters first, and none is given",
        "leave it out, or name them in adapter_name_or_path",
        all_of(_creates, not_(is_set("model", "adapter_name_or_path"))),
    ),
    Rule(
        ("train_from_scratch", "finetuning_type"),
        "only an adapter would be trained and saved, and the random weights that it belongs to would be lost",
        "set finetuning_type: full",
        all_of(is_set("model", "train_from_scratch"), not_(is_given("quantization", "quantization_bit"))),
    ),
    Rule(
        ("freeze_trainable_layers", "use_llama_pro"),
        "is read by finetuning_type: freeze, and here only if use_llama_pro is on",
        "",
        lambda run: "freeze_trainable_layers" in run.changed and not run.adapter.use_llama_pro,
        only_warns=True,
    ),
    Rule(
        ("freeze_trainable_layers", "use_llama_pro"),
        "is the number of inserted blocks, so it must be above 0",
        "give the number that `luthier expand` was given",
        lambda run: run.adapter.use_llama_pro and run.adapter.freeze_trainable_layers < 1,
    ),
)
"""Rules about the keys that every method of peft has."""


def common_settings(model: "PreTrainedModel", additional_target: Sequence[str]) -> dict[str, Any]:
    """Settings of every method of peft: the task, and the modules that are trained in full together with the adapter.

    peft adds the score layer of a reward model to these. Raises `ModelError` for names that no module has.
    """
    import peft

    saved = require_modules(model, additional_target, "additional_target")
    writes = peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM
    return {
        "task_type": peft.TaskType[SCORE_TASK] if gives_scores(model.config) else writes,
        "modules_to_save": list(saved) or None,
    }


def start_adapter(
    model: "PreTrainedModel", settings: "PeftConfig", *, key: str, wanted: Sequence[str], pure_bf16: bool
) -> "PeftModel":
    """Freeze the model and put the adapter on it. `key`, `wanted`: where its targets were named, for the error."""
    import peft

    try:
        with whole_adapters():
            return peft.get_peft_model(model, settings, autocast_adapter_dtype=not pure_bf16)
    except (TypeError, ValueError) as fault:  # e.g. a target that is a whole block, not a layer of weights
        raise ModelError(
            f"{key}: {', '.join(wanted)}: peft cannot adapt these modules of {type(model).__name__} "
            f"({str(fault).splitlines()[0]}) -> name linear layers, or all"
        ) from fault
