"""Read what a user wrote and return a checked, frozen run, or every problem at once. torch is not imported.

A key that the chosen variants do not read is a warning that names who would; a key nobody knows is an error.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from luthier.config.decode import Misfit, decode
from luthier.config.interpolate import interpolate
from luthier.config.key_table import (
    DATA,
    EXPORT,
    FINETUNING,
    FP8,
    GENERATING,
    KT,
    MODEL,
    PROCESSOR,
    PROFILER,
    QUANTIZATION,
    REGISTRIES,
    SWANLAB,
    Key,
    catalogue,
    feature_sections,
    keys_of,
    later_variants,
    optimizer_sections,
    sections,
)
from luthier.config.keys.export import EXPORT_RULES
from luthier.config.keys.fp8 import FP8_RULES
from luthier.config.keys.ktransformers import KT_ELSEWHERE_RULES, KT_RULES
from luthier.config.keys.legacy import LegacyTrainingConfig
from luthier.config.keys.processor import PROCESSOR_CHAT_RULES, PROCESSOR_RULES
from luthier.config.keys.profiling import PROFILER_RULES
from luthier.config.keys.quantization import QUANTIZATION_RULES, QUANTIZED_EXPORT_RULES, QUANTIZED_TRAINING_RULES
from luthier.config.keys.swanlab import SWANLAB_RULES
from luthier.config.keys.training import OWN_DEFAULTS, TrainingKeys
from luthier.config.masking import is_secret
from luthier.config.rules.engine import Rules
from luthier.config.rules.general import GENERATING_RULES, MODEL_RULES, OUTPUT_RULES, TRAIN_RULES, launcher_problems
from luthier.config.rules.memory import MEMORY_RULES
from luthier.config.rules.optim import OPTIM_RULES
from luthier.config.rules.streaming import STREAMING_RULES
from luthier.config.rules.unsloth import UNSLOTH_EXPORT_RULES, UNSLOTH_RULES, UNSLOTH_TRAINING_RULES
from luthier.config.runs import ExportRun, Features, InferRun, Run, TrainRun
from luthier.config.sections import Section, is_on
from luthier.config.source import COMMAND_LINE, Written, read
from luthier.core.errors import ConfigError, Problem
from luthier.core.kinds import ADAPTERS, FEATURES, OPTIMIZERS, QUANTIZERS, STAGES
from luthier.core.registry import nearest

if TYPE_CHECKING:
    from _typeshed import StrPath

PATHS = frozenset(
    {
        *("output_dir", "resume_from_checkpoint", "dataset_dir", "media_dir", "tokenized_path", "export_dir"),
        *("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model"),
        *("reward_model_adapters", "cache_dir", "offload_folder", "new_special_tokens_config", "deepspeed"),
        *("profiler_output_dir", "swanlab_logdir", "kt_weight_path", "kt_non_expert_weight_path"),
        "kt_expert_checkpoint_path",
    }
)
"""Keys whose values may begin with `~`, the home of the user."""
COMMAND_RULES: dict[str, tuple[Rules, ...]] = {
    "train": (
        *(MODEL_RULES, MEMORY_RULES, QUANTIZATION_RULES, QUANTIZED_TRAINING_RULES),
        *(UNSLOTH_RULES, UNSLOTH_TRAINING_RULES, KT_RULES),
        PROCESSOR_RULES,
        *(STREAMING_RULES, GENERATING_RULES, TRAIN_RULES, OPTIM_RULES, PROFILER_RULES, FP8_RULES, SWANLAB_RULES),
        OUTPUT_RULES,
    ),
    "infer": (
        *(MODEL_RULES, QUANTIZATION_RULES, UNSLOTH_RULES, KT_ELSEWHERE_RULES, GENERATING_RULES),
        *(PROCESSOR_RULES, PROCESSOR_CHAT_RULES),
    ),
    "export": (
        *(MODEL_RULES, QUANTIZED_EXPORT_RULES, UNSLOTH_EXPORT_RULES, KT_ELSEWHERE_RULES),
        *(PROCESSOR_RULES, EXPORT_RULES),
    ),
}


def load_train(
    source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = (), *, writes: bool = True
) -> TrainRun:
    """The run that a file, a mapping or command-line words describe. Raises `ConfigError` with all problems.

    `overrides` are more words (`key=value` or `--key value`) that go before what `source` says. `writes` false: the run
    is only looked at, so it needs no folder to write to.
    """
    run = load("train", read_source(source, overrides), writes=writes)
    assert isinstance(run, TrainRun)
    return run


def load_infer(source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = ()) -> InferRun:
    """As `load_train`, for commands that generate text."""
    run = load("infer", read_source(source, overrides))
    assert isinstance(run, InferRun)
    return run


def load_export(source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = ()) -> ExportRun:
    """As `load_train`, for `luthier export`."""
    run = load("export", read_source(source, overrides))
    assert isinstance(run, ExportRun)
    return run


def read_source(source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = ()) -> Written:
    """What the user wrote, interpolations replaced. Raises `ConfigError` if it cannot be read at all."""
    written = read(source, overrides, catalogue().__contains__)
    interpolate(written, os.environ)
    return written


def load(command: str, written: Written, *, writes: bool = True) -> Run:
    """Decode and check. `command` is one of `luthier.config.sections.RUN_COMMANDS`; `writes` as in `load_train`."""
    draft = _Draft(command, written)
    draft.decode()
    draft.judge()
    run = draft.build()
    draft.apply_rules(run, [rules for rules in COMMAND_RULES[command] if writes or rules is not OUTPUT_RULES])
    if draft.problems:
        raise ConfigError(written.source, sorted(draft.problems, key=_place))
    return replace(run, warnings=tuple(sorted(draft.warnings, key=_place)))


def locate(problem: Problem, written: Written) -> Problem:
    """`problem` with the file, line and value of its key, if the key was written."""
    entry = written.entries.get(problem.key)
    if entry is None or problem.file:
        return problem if problem.file else replace(problem, file=written.source)
    value = "***" if is_secret(problem.key) else problem.value if problem.has_value else entry.value
    return replace(problem, value=value, has_value=True, file=entry.file, line=entry.line)


def _below_home(value: Any) -> Any:
    """`~/data` -> `/home/me/data`; a shell would have done it only for a word of its own."""
    if isinstance(value, tuple):
        return tuple(map(_below_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def _place(problem: Problem) -> tuple[bool, str, int]:
    return problem.line is None, problem.file, problem.line or 0


class _Draft:
    """A run in the making: the values decoded so far, and what was found wrong."""

    def __init__(self, command: str, written: Written) -> None:
        self.command, self.written = command, written
        self.problems = list(written.problems)
        self.warnings: list[Problem] = []
        self.given: dict[str, Any] = {}

    def blame(self, key: str, reason: str, remedy: str = "") -> None:
        self.problems.append(locate(Problem(key, reason, remedy), self.written))

    def warn(self, key: str, reason: str, remedy: str = "") -> None:
        self.warnings.append(locate(Problem(key, reason, remedy), self.written))

    def decode(self) -> None:
        """Fill `given`; unknown keys and values of the wrong type are problems."""
        for name, entry in self.written.entries.items():
            if name not in catalogue():
                self._unknown(name)
                continue
            key = catalogue()[name][0]
            if key.is_variant and entry.value in later_variants(name):
                self._later_variant(name, str(entry.value))
                continue
            if isinstance(key.default, tuple) and (entry.value is None or entry.value == "null"):
                self.given[name] = key.default
                continue
            try:
                value = decode(entry.value, key.type, key.choices)
                self.given[name] = _below_home(value) if name in PATHS else value
            except Misfit as misfit:
                if entry.value is True and entry.file == COMMAND_LINE:
                    self.blame(name, f"needs a value: {misfit.reason}", f"write --{name} VALUE")
                else:
                    self.blame(name, misfit.reason, key.remedies.get(str(entry.value).lower(), misfit.remedy))

    def _unknown(self, name: str) -> None:
        close = nearest(name, catalogue())
        remedy = f"did you mean {close}?" if close else "see docs/reference/keys.md"
        if is_on(os.environ, "ALLOW_EXTRA_ARGS"):
            self.warn(name, "unknown key, not read", remedy)
        else:
            self.blame(name, "unknown key", remedy)

    def _later_variant(self, name: str, value: str) -> None:
        """Known by name, so its keys are judged as those of a run that has it."""
        self.given[name] = value
        self.blame(name, f"{value} is not part of this version", f"use one of {', '.join(REGISTRIES[name].names)}")

    def value(self, name: str) -> Any:
        """What was given for a key, or its default."""
        return self.given[name] if name in self.given else catalogue()[name][0].default

    def judge(self) -> None:
        """Refused values become problems; keys without effect and keys that nobody reads become warnings."""
        switches = {section.key for section in sections() if section.key}
        values = {name: self.value(name) for name in switches}
        for name in self.given:
            keys = catalogue()[name]
            readers = [
                key for key in keys if key.section.reads(self.command, values, os.environ) or self._is_switch(key)
            ]
            if readers:
                self._judge_status(readers[0])
                continue
            reader = " or ".join(dict.fromkeys(key.section.reader(self.command) for key in keys))
            if self.command == "train" and keys[0].is_never_unread and self.given[name] != keys[0].default:
                self.blame(name, f"is for {reader} only", f"set {reader}, or leave it out")
            else:
                self.warn(name, f"is not read here, only by {reader}")

    def _is_switch(self, key: Key) -> bool:
        return key.name == key.section.key and self.command in key.section.commands

    def _judge_status(self, key: Key) -> None:
        value = self.given[key.name]
        if key.status == "refused" and value not in key.allowed:
            self.blame(key.name, key.reason, key.remedy)
        elif key.status == "no_effect" and value not in key.allowed:
            self.warn(key.name, f"has no effect: {key.reason}")
        elif key.status == "renamed":
            self.warn(key.name, key.reason)

    def build(self) -> Run:
        """The run, with defaults in the place of what could not be decoded."""
        stage, finetuning_type = self.value("stage"), self.value("finetuning_type")
        common = {
            "source": self.written.source,
            "stage": stage,
            "finetuning_type": finetuning_type,
            "model": self._section(MODEL),
            "features": Features(**{name: self._section(part) for name, part in feature_sections().items()}),
            "quantization": self._section(QUANTIZATION),
            "data": self._section(DATA),
            "processor": self._section(PROCESSOR),
            "finetuning": self._section(FINETUNING),
            "generating": self._section(GENERATING),
            "adapter": self._section(self._variant_section("finetuning_type", finetuning_type)),
            "given": MappingProxyType(dict(self.given)),
            "changed": frozenset(n for n, value in self.given.items() if value != catalogue()[n][0].default),
        }
        if self.command == "train":
            method = self._section(self._variant_section("stage", stage))
            optimizers = {name: self._section(section) for name, section in self._optimizers().items()}
            return TrainRun(
                **common,
                method=method,
                training=self._training(),
                optimizers=MappingProxyType(optimizers),
                profiler=self._section(PROFILER),
                fp8=self._section(FP8),
                swanlab=self._section(SWANLAB),
                kt=self._section(KT),
            )
        if self.command == "export":
            return ExportRun(**common, export=self._section(EXPORT))
        return InferRun(**common)

    def _optimizers(self) -> Mapping[str, Section]:
        """Those that are switched on."""
        found = optimizer_sections()
        values = {section.key: self.value(section.key) for section in found.values()}
        return {name: part for name, part in found.items() if part.reads(self.command, values, os.environ)}

    def _variant_section(self, key: str, value: str) -> Section:
        return next(section for section in sections() if section.key == key and value in section.values)

    def _section(self, section: Section) -> Any:
        values = {key.name: self.given[key.name] for key in keys_of(section) if key.name in self.given}
        for key in keys_of(section):
            if key.is_required and key.name not in values:
                values[key.name] = ""
                if key.name not in self.written.entries:
                    self.blame(key.name, "is missing", "every run needs it")
        return section.config(**values)

    def _training(self) -> TrainingKeys:
        given: dict[str, Any] = {}
        for name, value in self.given.items():
            for key in catalogue()[name]:
                if key.section.config is TrainingKeys or name in OWN_DEFAULTS:
                    given[name] = value
                elif key.section.config is LegacyTrainingConfig and key.current:
                    given.setdefault(key.current, value)
        return TrainingKeys(MappingProxyType(given))

    def apply_rules(self, run: Run, command_rules: Iterable[Rules]) -> None:
        """Rules between keys. A key already at fault is not blamed again, since a default stands in its place."""
        at_fault = {problem.key for problem in self.problems}
        found: list[Problem] = []
        for rules in command_rules:
            found += rules(run)
            self.warnings += self._located(rules.broken_by(run, warnings=True))
        for check in self._variant_checks(run):
            found += check(run)
            if isinstance(check, Rules):
                self.warnings += self._located(check.broken_by(run, warnings=True))
        if self.command == "train":
            found += launcher_problems()
        self.problems += self._located(problem for problem in found if problem.key not in at_fault)

    def _variant_checks(self, run: Run) -> list[Any]:
        checks: list[Any] = [FEATURES.get(name).check for name in FEATURES.names]
        if isinstance(run, TrainRun) and run.finetuning_type in ADAPTERS.names:
            checks.append(ADAPTERS.get(run.finetuning_type).check)
        if isinstance(run, TrainRun) and run.stage in STAGES.names:
            checks.append(STAGES.get(run.stage).check)
        if isinstance(run, TrainRun):
            checks += [OPTIMIZERS.get(name).check for name in run.optimizers]
        keys = run.quantization
        quantizes = keys.quantization_bit is not None and not isinstance(run, ExportRun)
        if quantizes and keys.quantization_method in QUANTIZERS.names:
            checks.append(QUANTIZERS.get(keys.quantization_method).check)
        return checks

    def _located(self, problems: Iterable[Problem]) -> list[Problem]:
        return [locate(problem, self.written) for problem in problems]
