"""Every key that luthier knows: its type, default, status and owners.

The one table that loading, `explain`, `schema` and the key reference read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from luthier.config.keys.bridge import BridgeConfig
from luthier.config.keys.data import DataConfig
from luthier.config.keys.engines import SglangConfig, VllmConfig
from luthier.config.keys.evaluate import EvalConfig, EvalTasksConfig
from luthier.config.keys.export import ExportConfig
from luthier.config.keys.finetuning import FinetuningConfig, MethodChoice
from luthier.config.keys.fp8 import Fp8Config
from luthier.config.keys.generate import GeneratingConfig
from luthier.config.keys.ktransformers import KTransformersConfig
from luthier.config.keys.later import LATER
from luthier.config.keys.legacy import LegacyTrainingConfig
from luthier.config.keys.mcore import McoreConfig
from luthier.config.keys.model import ModelConfig
from luthier.config.keys.parallel import ParallelConfig
from luthier.config.keys.processor import ProcessorConfig
from luthier.config.keys.profiling import ProfilerConfig
from luthier.config.keys.quantization import QuantizationConfig
from luthier.config.keys.ray import RayConfig
from luthier.config.keys.recovery import RecoveryConfig
from luthier.config.keys.swanlab import SwanlabConfig
from luthier.config.keys.training import NOTES, TrainingKeys, training_table
from luthier.config.sections import Section
from luthier.core.kinds import ADAPTERS, ENGINES, FEATURES, OPTIMIZERS, QUANTIZERS, STAGES

MODEL = Section("model", ModelConfig)
QUANTIZATION = Section("quantization", QuantizationConfig, key="quantization_bit", example="4")
DATA = Section("data", DataConfig)
PROCESSOR = Section("processor", ProcessorConfig)
CHOICE = Section("method choice", MethodChoice)
FINETUNING = Section("finetuning", FinetuningConfig, commands=("train",))
RECOVERY = Section("recovery", RecoveryConfig, commands=("train",))
PARALLEL = Section("parallel", ParallelConfig, commands=("train",))
GENERATING = Section("generating", GeneratingConfig, commands=("train", "infer", "eval"))
VLLM = Section("vllm", VllmConfig, ("infer",), "infer_backend", ("vllm",))
SGLANG = Section("sglang", SglangConfig, ("infer",), "infer_backend", ("sglang",))
EVALUATION = Section("evaluation", EvalConfig, commands=("eval",))
EVAL_TASKS = Section("tasks while training", EvalTasksConfig, ("train",), "eval_tasks", example="mmlu_test")
EXPORT = Section("export", ExportConfig, commands=("export",))
PROFILER = Section("profiler", ProfilerConfig, commands=("train",), key="enable_torch_profiler")
FP8 = Section("fp8", Fp8Config, commands=("train",), key="fp8")
SWANLAB = Section("swanlab", SwanlabConfig, commands=("train",), key="use_swanlab")
MCORE = Section("mcore", McoreConfig, commands=("train",), environment="USE_MCA")
BRIDGE = Section("megatron_bridge", BridgeConfig, commands=("train",), environment="USE_MEGATRON_BRIDGE")
RAY = Section("ray", RayConfig, commands=("train",), environment="USE_RAY")
KT = Section("ktransformers", KTransformersConfig, key="use_kt")
TRAINING = Section("training", TrainingKeys, commands=("train",))
LEGACY = Section("legacy", LegacyTrainingConfig, commands=("train",))

REGISTRIES = {registry.key: registry for registry in (STAGES, ADAPTERS, QUANTIZERS, ENGINES)}
"""The registries whose key is a key of the run file."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a run file, as one section declares it."""

    name: str
    type: Any
    section: Section
    default: Any = None
    is_required: bool = False
    choices: tuple[str, ...] = ()
    status: str = "supported"
    """supported, no_effect, refused, renamed, or later (a variant this version does not have reads it)."""
    reason: str = ""
    remedy: str = ""
    allowed: tuple[Any, ...] = ()
    """Values that pass silently although the key is refused or has no effect."""
    current: str = ""
    """The key that a renamed key is stored under."""
    becomes: str = ""
    """Of a switch that is a value of `current` today: that value."""
    is_variant: bool = False
    """The values are the names of a registry."""
    remedies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of a variant: wrong value in small letters -> what to write instead."""
    is_never_unread: bool = False
    """In a training run that does not read it, any value but the default is an error."""

    def stored(self, value: Any) -> Any:
        """What a renamed key stores under `current`; None for nothing."""
        if not self.becomes:
            return value
        return self.becomes if value else None


@cache
def sections() -> tuple[Section, ...]:
    """Every section, those of the variants included."""
    stages = [Section(name, STAGES.get(name).config, ("train",), "stage", (name,)) for name in STAGES.names]
    adapters = [
        Section(name, ADAPTERS.get(name).config, key="finetuning_type", values=(name,)) for name in ADAPTERS.names
    ]
    optimizers = tuple(optimizer_sections().values())
    return (
        *(
            CHOICE,
            MODEL,
            *feature_sections().values(),
            QUANTIZATION,
            *adapters,
            DATA,
            PROCESSOR,
            *stages,
            FINETUNING,
            RECOVERY,
            PARALLEL,
            *optimizers,
            PROFILER,
            FP8,
            SWANLAB,
            MCORE,
            BRIDGE,
            RAY,
            KT,
        ),
        *(TRAINING, LEGACY, GENERATING, VLLM, SGLANG, EXPORT, EVALUATION, EVAL_TASKS, *LATER),
    )


@cache
def feature_sections() -> Mapping[str, Section]:
    """Name of a model feature -> its keys."""
    return {name: Section(name, FEATURES.get(name).config) for name in FEATURES.names}


@cache
def optimizer_sections() -> Mapping[str, Section]:
    """Name of an optimizer -> its keys, read if its switch is on."""
    found = {name: OPTIMIZERS.get(name) for name in OPTIMIZERS.names}
    return {name: Section(name, value.config, ("train",), value.switch) for name, value in found.items()}


@cache
def keys_of(section: Section) -> tuple[Key, ...]:
    """The keys that a section declares."""
    return tuple(_training_keys() if section is TRAINING else _declared_keys(section))


def _training_keys() -> Iterator[Key]:
    for name, entry in training_table().items():
        note = dict(NOTES.get(name, {}))
        allowed = (entry.default, *note.pop("allowed", ()))
        yield Key(name, entry.type, TRAINING, entry.default, choices=entry.choices, allowed=allowed, **note)


def _declared_keys(section: Section) -> Iterator[Key]:
    is_later = section in LATER
    for field in dataclasses.fields(section.config):
        note = dict(field.metadata)
        is_variant, also = note.pop("variant", False), note.pop("also", ())
        if is_later:
            note.setdefault("status", "later")
        yield Key(
            field.name,
            field.type,
            section,
            default=None if field.default is dataclasses.MISSING else field.default,
            is_required=field.default is dataclasses.MISSING,
            choices=(*REGISTRIES[field.name].names, *also) if is_variant else (),
            is_variant=is_variant,
            **note,
        )


@cache
def catalog() -> Mapping[str, tuple[Key, ...]]:
    """Name -> the key as each of its owners declares it, the owner that this version has first."""
    found: dict[str, list[Key]] = {}
    for section in sections():
        for key in keys_of(section):
            found.setdefault(key.name, []).append(key)
    return {name: tuple(keys) for name, keys in found.items()}
