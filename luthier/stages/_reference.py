"""Keys and rules that the stages with a reference model share."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import (
    Condition,
    Rule,
    all_of,
    is_given,
    is_set,
    merged_once,
    missing_library,
    not_,
    value_of,
    warning,
)
from luthier.core.versions import is_installed
from luthier.stages import FrozenModelSpec

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    ref_model: str | None = None
    """The reference model; if unset, the model at the start of training, adapters included."""
    ref_model_adapters: tuple[str, ...] = ()
    """Adapters of the reference model, merged in this order."""
    ref_model_quantization_bit: int | None = None
    """Bits to load ref_model with, 4 or 8, by bitsandbytes."""


def bits_of_other(key: str, model_key: str) -> tuple[Rule, ...]:
    """Rules for the quantization bits of a frozen model."""
    bits = value_of("method", key)
    return (
        Rule(
            (key,),
            "bitsandbytes has 4 and 8 bits",
            "give one of these, or leave it out",
            lambda run: bits(run) not in (None, 4, 8),
        ),
        Rule(
            (key, model_key),
            f"is about {model_key}, and there is none",
            f"name {model_key}, or leave it out",
            all_of(is_given("method", key), not_(is_given("method", model_key))),
        ),
        missing_library(
            key,
            "bitsandbytes",
            "pip install 'luthier[bnb]'",
            lambda run: bits(run) in (4, 8) and not is_installed("bitsandbytes"),
        ),
    )


REFERENCE_RULES = (
    *bits_of_other("ref_model_quantization_bit", "ref_model"),
    merged_once("method", "ref_model_adapters"),
)


def reference_model(config: ReferenceConfig, *, is_cached: bool = False) -> FrozenModelSpec:
    """`ref_model`, or the policy at the start of training. `is_cached`: see `FrozenModelSpec`."""
    bits = config.ref_model_quantization_bit
    return FrozenModelSpec("reference", "ref_model", config.ref_model, config.ref_model_adapters, bits, is_cached)


def _of_adapter(run: "TrainRun", *keys: str) -> bool:
    """Whether one of these adapter keys is set; not every kind of adapter has them."""
    values = asdict(run.adapter)
    return any(values.get(key) for key in keys)


NO_DROPOUT = warning(
    ("lora_dropout", "module_dropout", "stage"),
    "has no effect: log-probabilities of answers are computed without dropout, as in the reference",
    "leave it out",
    lambda run: _of_adapter(run, "lora_dropout", "module_dropout"),
)

NO_PREDICTIONS = Rule(
    ("do_predict", "stage"),
    "writes answers, which is for stage sft",
    "leave it out, or use stage: sft with the trained model",
    is_set("training", "do_predict"),
)


def adapters_of_reference(has_reference: Condition) -> Rule:
    return Rule(
        ("ref_model_adapters", "ref_model"),
        "are adapters of ref_model, and there is none",
        "set ref_model, e.g. to the same as model_name_or_path",
        all_of(has_reference, is_set("method", "ref_model_adapters"), not_(is_given("method", "ref_model"))),
    )


def of_reference(has_reference: Condition) -> tuple[Rule, ...]:
    """Rules for the keys of `ReferenceConfig`."""
    return (
        *REFERENCE_RULES,
        adapters_of_reference(has_reference),
        warning(
            ("ref_model", "do_train"),
            "is not given, and a run that does not train compares the model with itself, so all rewards are 0",
            "set ref_model: the model that training began with",
            lambda run: not run.trains and has_reference(run) and run.method.ref_model is None,
        ),
    )
