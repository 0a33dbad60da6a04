"""The one table of rules: which groups apply to which command, and which variants bring rules of their own.

Loading a run and `luthier explain` both read it, so no rule can apply without being explained.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from luthier.config.rules.bridge import BRIDGE_RULES
from luthier.config.rules.data import DATA_RULES
from luthier.config.rules.engine import Rule, Rules
from luthier.config.rules.engines import ENGINE_EXPORT_RULES, ENGINE_RULES, ENGINE_TRAINING_RULES
from luthier.config.rules.eval_command import EVAL_RULES, kinds_of
from luthier.config.rules.evaluation import EVALUATION_RULES
from luthier.config.rules.export import EXPORT_RULES
from luthier.config.rules.fp8 import FP8_RULES
from luthier.config.rules.generating import GENERATING_RULES
from luthier.config.rules.ktransformers import KT_ELSEWHERE_RULES, KT_RULES
from luthier.config.rules.launch import LAUNCH_RULES
from luthier.config.rules.mcore import MCORE_RULES
from luthier.config.rules.memory import MEMORY_RULES
from luthier.config.rules.model import MODEL_RULES
from luthier.config.rules.optim import OPTIM_RULES
from luthier.config.rules.parallel import PARALLEL_RULES
from luthier.config.rules.processor import PROCESSOR_RULES
from luthier.config.rules.profiling import PROFILER_RULES
from luthier.config.rules.quantization import (
    QUANTIZATION_RULES,
    QUANTIZED_EXPORT_RULES,
    QUANTIZED_TRAINING_RULES,
)
from luthier.config.rules.ray import RAY_RULES
from luthier.config.rules.recovery import RECOVERY_RULES
from luthier.config.rules.streaming import STREAMING_RULES
from luthier.config.rules.swanlab import SWANLAB_RULES
from luthier.config.rules.task import OUTPUT_RULES, TASK_RULES
from luthier.config.rules.tensor_parallel import TENSOR_PARALLEL_RULES
from luthier.config.rules.training import TRAINING_RULES
from luthier.config.rules.unsloth import UNSLOTH_EXPORT_RULES, UNSLOTH_RULES, UNSLOTH_TRAINING_RULES
from luthier.core.kinds import ADAPTERS, EVAL_KINDS, FEATURES, OPTIMIZERS, QUANTIZERS, STAGES
from luthier.core.registry import Registry

COMMAND_RULES: Mapping[str, tuple[Rules, ...]] = {
    "train": (
        *(MODEL_RULES, MEMORY_RULES, QUANTIZATION_RULES, QUANTIZED_TRAINING_RULES),
        *(UNSLOTH_RULES, UNSLOTH_TRAINING_RULES, KT_RULES, PROCESSOR_RULES),
        *(TASK_RULES, DATA_RULES, STREAMING_RULES, GENERATING_RULES, EVALUATION_RULES, TRAINING_RULES, OPTIM_RULES),
        *(ENGINE_TRAINING_RULES, LAUNCH_RULES, RAY_RULES, PROFILER_RULES, FP8_RULES, SWANLAB_RULES, RECOVERY_RULES),
        *(PARALLEL_RULES, TENSOR_PARALLEL_RULES, MCORE_RULES, BRIDGE_RULES, OUTPUT_RULES),
    ),
    "infer": (
        *(MODEL_RULES, QUANTIZATION_RULES, UNSLOTH_RULES, KT_ELSEWHERE_RULES, GENERATING_RULES),
        *(PROCESSOR_RULES, ENGINE_RULES),
    ),
    "export": (
        *(MODEL_RULES, QUANTIZED_EXPORT_RULES, UNSLOTH_EXPORT_RULES, KT_ELSEWHERE_RULES),
        *(PROCESSOR_RULES, EXPORT_RULES, ENGINE_EXPORT_RULES),
    ),
    "eval": (
        *(MODEL_RULES, QUANTIZATION_RULES, UNSLOTH_RULES, KT_ELSEWHERE_RULES, GENERATING_RULES),
        *(PROCESSOR_RULES, DATA_RULES, EVAL_RULES),
    ),
}


def _quantizer(run: Any) -> Iterator[str]:
    keys = run.quantization
    if keys.quantization_bit is not None and keys.quantization_method in QUANTIZERS.names:
        yield keys.quantization_method


Chosen = Callable[[Any], Iterable[str]]
"""(run) -> the names of the variants that it uses."""
_ALL_FEATURES = (FEATURES, lambda run: FEATURES.names)
VARIANTS: Mapping[str, tuple[tuple[Registry, Chosen], ...]] = {
    "train": (
        _ALL_FEATURES,
        (ADAPTERS, lambda run: (run.finetuning_type,)),
        (STAGES, lambda run: (run.stage,)),
        (OPTIMIZERS, lambda run: run.optimizers),
        (QUANTIZERS, _quantizer),
    ),
    "infer": (_ALL_FEATURES, (QUANTIZERS, _quantizer)),
    "export": (_ALL_FEATURES,),
    "eval": (_ALL_FEATURES, (QUANTIZERS, _quantizer), (EVAL_KINDS, kinds_of)),
}
"""Command -> the kinds of variants whose `check` is read."""


def broken_rules(
    command: str, run: Any, *, writes: bool = True, unknown: Collection[str] = frozenset()
) -> Iterator[Rule]:
    """The rules that a run of `command` breaks.

    `writes` false: only the rows of the run are inspected, so it needs no output folder, and no reward or teacher.
    `unknown`: keys whose value is unknown, e.g. misspelt; rules about them, and the rules of variants that they
    choose, are left out.
    """
    groups = list(COMMAND_RULES[command])
    for registry, chosen in VARIANTS[command]:
        if registry.key not in unknown:
            groups += [registry.get(name).check for name in chosen(run)]
    for group in groups:
        for rule in group:
            applies = command in rule.commands and (writes or rule.for_rows)
            if applies and not any(key in unknown for key in rule.keys) and rule.broken(run):
                yield rule


def all_rules() -> Iterator[tuple[Rule, str, str]]:
    """(rule, command, the variant that it belongs to, as in `stage: dpo`, or nothing)."""
    for command, groups in COMMAND_RULES.items():
        found = [(group, "") for group in groups]
        for registry, _ in VARIANTS[command]:
            found += [(registry.get(name).check, _chosen_by(registry, name)) for name in registry.names]
        for group, variant in found:
            yield from ((rule, command, variant) for rule in group if command in rule.commands)


def _chosen_by(registry: Registry, name: str) -> str:
    """How a run file chooses a variant; nothing for features, which apply to every run."""
    if registry is FEATURES:
        return ""
    return OPTIMIZERS.get(name).switch if registry is OPTIMIZERS else f"{registry.key}: {name}"
