"""Read what a user wrote and return a checked, frozen run, or all problems at once. torch is not imported.

A key that the chosen variants do not read is a warning that names the variant that would; an unknown key is an error.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isinf
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, get_args

from luthier.config.decode import Misfit, decode, is_null
from luthier.config.interpolate import interpolate
from luthier.config.key_table import (
    BRIDGE,
    DATA,
    EVAL_TASKS,
    EVALUATION,
    EXPORT,
    FINETUNING,
    FP8,
    GENERATING,
    KT,
    MCORE,
    MODEL,
    PARALLEL,
    PROCESSOR,
    PROFILER,
    QUANTIZATION,
    RAY,
    RECOVERY,
    SGLANG,
    SWANLAB,
    VLLM,
    Key,
    catalog,
    feature_sections,
    keys_of,
    optimizer_sections,
    sections,
)
from luthier.config.keys.legacy import LegacyTrainingConfig
from luthier.config.keys.training import OWN_DEFAULTS, TrainingKeys
from luthier.config.masking import is_secret
from luthier.config.other_versions import other_key
from luthier.config.rules.table import broken_rules
from luthier.config.runs import EvalRun, ExportRun, Features, InferRun, Run, TrainRun
from luthier.config.sections import Section, is_on
from luthier.config.source import COMMAND_LINE, Written, parse, read
from luthier.core.errors import ConfigError, Problem
from luthier.core.registry import nearest, question

if TYPE_CHECKING:
    from _typeshed import StrPath

PATHS = frozenset(
    {
        *("output_dir", "resume_from_checkpoint", "dataset_dir", "media_dir", "tokenized_path", "export_dir"),
        *("task_dir", "save_dir", "compare", "html"),
        *("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model"),
        *("reward_model_adapters", "cache_dir", "offload_folder", "new_special_tokens_config", "deepspeed"),
        *("profiler_output_dir", "swanlab_logdir", "kt_weight_path", "kt_non_expert_weight_path"),
        *("kt_expert_checkpoint_path", "fsdp_config", "accelerator_config"),
    }
)
"""Keys whose values may begin with `~`, the home of the user, and of which an empty text names nothing."""
UNBOUNDED = ("max_grad_norm",)
"""Keys that may be infinite: gradients of any norm are left as they are."""


def load_train(
    source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = (), *, writes: bool = True
) -> TrainRun:
    """The run that a file, a mapping or command-line words describe. Raises `ConfigError` with all problems.

    `overrides` are more words (`key=value` or `--key value`) that take precedence over `source`. `writes` false: the
    run is only inspected, so it needs no output folder.
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


def load_eval(source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = ()) -> EvalRun:
    """As `load_train`, for `luthier eval`."""
    run = load("eval", read_source(source, overrides))
    assert isinstance(run, EvalRun)
    return run


def read_source(source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str] = ()) -> Written:
    """What the user wrote, with interpolations resolved. Raises `ConfigError` if it cannot be read at all."""
    written = read(source, overrides, catalog().__contains__)
    interpolate(written, os.environ)
    return written


def read_text(text: str, name: str) -> Written:
    """As `read_source`, for the text of a run file called `name`."""
    written = parse(Path(name), text)
    interpolate(written, os.environ)
    return written


def load(command: str, written: Written, *, writes: bool = True) -> Run:
    """Decode and check. `command` is one of `luthier.config.sections.RUN_COMMANDS`; `writes` as in `load_train`."""
    return Draft(command, written, writes=writes).finish()


def locate(problem: Problem, written: Written) -> Problem:
    """`problem` with the file, line and value of its key, if the key was written."""
    entry = written.entries.get(problem.key)
    if entry is None or problem.file:
        return problem if problem.file else replace(problem, file=written.source)
    value = "***" if is_secret(problem.key) else problem.value if problem.has_value else entry.value
    return replace(problem, value=value, has_value=True, file=entry.file, line=entry.line)


def _as_path(value: Any, *, or_null: bool) -> Any:
    """`~/data` -> `/home/me/data`, which a shell does only for a word that begins with `~`.

    Empty text is null if the key takes that (`or_null`): Python would take it for the current folder.
    """
    if isinstance(value, tuple):
        return tuple(_as_path(item, or_null=or_null) for item in value)
    if value == "" and or_null:
        return None
    return os.path.expanduser(value) if isinstance(value, str) else value


def _is_infinite(value: Any) -> bool:
    return any(isinstance(item, float) and isinf(item) for item in (value if isinstance(value, tuple) else (value,)))


class Draft:
    """A run with all that was found wrong in it so far. Whoever finds more adds it, and `finish` raises once."""

    def __init__(self, command: str, written: Written, *, writes: bool = True, begins: bool = True) -> None:
        """`begins`: the run starts here, so a library that is missing here is an error, and otherwise a warning."""
        self.command, self.written = command, written
        self.problems = list(written.problems)
        self.warnings: list[Problem] = []
        self.given: dict[str, Any] = {}
        self.unknown = {problem.key for problem in written.problems if problem.key not in written.entries}
        """Keys whose value is unknown. The run holds their defaults, from which nothing may be concluded."""
        self._decode()
        self._judge()
        self.run = self._build()
        """With defaults in place of what could not be decoded."""
        self._apply_rules(writes, begins)

    def add(self, problems: Iterable[Problem], warnings: Iterable[Problem]) -> None:
        """Add what was found wrong with the values. Keys whose value is unknown are left out."""
        self.problems += [locate(problem, self.written) for problem in problems if problem.key not in self.unknown]
        self.warnings += [locate(problem, self.written) for problem in warnings if problem.key not in self.unknown]

    def finish(self) -> Run:
        """The run with its warnings. Raises `ConfigError` with all problems and warnings, in the order of the file."""
        warnings = tuple(sorted(self.warnings, key=self._place))
        if self.problems:
            raise ConfigError(self.written.source, sorted(self.problems, key=self._place), warnings)
        return replace(self.run, warnings=warnings)

    def _place(self, problem: Problem) -> tuple[bool, bool, str, int]:
        """The lines of the run file come first, then those of other files, then what stands on no line."""
        return problem.line is None, problem.file != self.written.source, problem.file, problem.line or 0

    def _blame(self, key: str, reason: str, remedy: str = "") -> None:
        self.problems.append(locate(Problem(key, reason, remedy), self.written))

    def _warn(self, key: str, reason: str, remedy: str = "") -> None:
        self.warnings.append(locate(Problem(key, reason, remedy), self.written))

    def _decode(self) -> None:
        """Fill `given`; unknown keys and values of the wrong type are problems."""
        for name, entry in self.written.entries.items():
            if name not in catalog():
                self._unknown(name)
                continue
            key = catalog()[name][0]
            if isinstance(key.default, tuple) and is_null(entry.value):
                self.given[name] = key.default
                continue
            try:
                value = decode(entry.value, key.type, key.choices)
                if name not in UNBOUNDED and _is_infinite(value):
                    raise Misfit("must be a finite number")
                or_null = key.default is None and NoneType in get_args(key.type)
                self.given[name] = _as_path(value, or_null=or_null) if name in PATHS else value
            except Misfit as misfit:
                self.unknown |= {name, key.current or name}
                if entry.value is True and entry.file == COMMAND_LINE:
                    self._blame(name, f"needs a value: {misfit.reason}", f"write --{name} VALUE")
                else:
                    self._blame(name, misfit.reason, key.remedies.get(str(entry.value).lower(), misfit.remedy))

    def _unknown(self, name: str) -> None:
        other = other_key(name)
        close = other.named if other else nearest(name, catalog())
        kind = other.reason if other else "unknown key"
        value = self.written.entries[name].value
        remedy = (
            other.remedy_for(name, value, catalog().__contains__)
            if other
            else question(close) or "see docs/reference/keys.md"
        )
        if is_on(os.environ, "ALLOW_EXTRA_ARGS"):
            self._warn(name, f"{kind}, not read", remedy)
        else:
            self._blame(name, kind, remedy)
            self.unknown.update(key for key in close[:1] if key not in self.written.entries)

    def _value(self, name: str) -> Any:
        """What was given for a key, or its default."""
        return self.given[name] if name in self.given else catalog()[name][0].default

    def _judge(self) -> None:
        """Refused values become problems; keys without effect and keys that nobody reads become warnings.

        It is unknown who reads a key if the key that decides it has an unknown value.
        """
        switches = {section.key for section in sections() if section.key}
        values = {name: self._value(name) for name in switches}
        for name in self.given:
            keys = catalog()[name]
            readers = [key for key in keys if self._reads(key.section, values) or self._is_switch(key)]
            if readers:
                self._judge_status(readers[0])
                continue
            if any(key.section.key in self.unknown for key in keys):
                continue
            reader = " or ".join(dict.fromkeys(key.section.reader(self.command) for key in keys))
            if self.command == "train" and keys[0].is_never_unread and self.given[name] != keys[0].default:
                self._blame(name, f"is for {reader} only", f"set {reader}, or leave it out")
            else:
                self._warn(name, f"is not read here, only by {reader}")

    def _reads(self, section: Section, values: Mapping[str, Any]) -> bool:
        """The run file of a training run can be evaluated as it is, so that has no unread keys."""
        commands = (self.command, "train") if self.command == "eval" else (self.command,)
        return any(section.reads(command, values, os.environ) for command in commands)

    def _is_switch(self, key: Key) -> bool:
        return key.name == key.section.key and self.command in key.section.commands

    def _judge_status(self, key: Key) -> None:
        value = self.given[key.name]
        if key.status == "refused" and value not in key.allowed:
            self._blame(key.name, key.reason, key.remedy)
        elif key.status == "no_effect" and value not in key.allowed:
            self._warn(key.name, f"has no effect: {key.reason}")
        elif key.status == "renamed" and (value or not key.becomes):
            self._warn(key.name, key.reason)

    def _build(self) -> Run:
        """The run, with defaults for what could not be decoded."""
        stage, finetuning_type = self._value("stage"), self._value("finetuning_type")
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
            "changed": frozenset(n for n, value in self.given.items() if value != catalog()[n][0].default),
        }
        if self.command in ("train", "eval"):
            method = self._section(self._variant_section("stage", stage))
            optimizers = {name: self._section(section) for name, section in self._optimizers().items()}
            common |= {
                "method": method,
                "training": self._training(),
                "optimizers": MappingProxyType(optimizers),
                "profiler": self._section(PROFILER),
                "fp8": self._section(FP8),
                "swanlab": self._section(SWANLAB),
                "recovery": self._section(RECOVERY),
                "parallel": self._section(PARALLEL),
                "mcore": self._section(MCORE),
                "bridge": self._section(BRIDGE),
                "ray": self._section(RAY),
                "kt": self._section(KT),
                "tasks": self._section(EVAL_TASKS),
            }
            return TrainRun(**common) if self.command == "train" else self._eval_run(common)
        if self.command == "export":
            return ExportRun(**common, export=self._section(EXPORT))
        return InferRun(**common, vllm=self._section(VLLM), sglang=self._section(SGLANG))

    def _eval_run(self, common: Mapping[str, Any]) -> EvalRun:
        return EvalRun(**common, evaluation=self._section(EVALUATION))

    def _optimizers(self) -> Mapping[str, Section]:
        """Those that are switched on."""
        found = optimizer_sections()
        values = {section.key: self._value(section.key) for section in found.values()}
        return {name: part for name, part in found.items() if part.reads(self.command, values, os.environ)}

    def _variant_section(self, key: str, value: str) -> Section:
        return next(section for section in sections() if section.key == key and value in section.values)

    def _section(self, section: Section) -> Any:
        values = {key.name: self.given[key.name] for key in keys_of(section) if key.name in self.given}
        for key in keys_of(section):
            if key.is_required and key.name not in values:
                values[key.name] = ""
                if key.name not in self.unknown:
                    self._blame(key.name, "is missing", "every run needs it")
                    self.unknown.add(key.name)
        return section.config(**values)

    def _training(self) -> TrainingKeys:
        given: dict[str, Any] = {}
        for name, value in self.given.items():
            for key in catalog()[name]:
                if key.section.config is TrainingKeys or name in OWN_DEFAULTS:
                    given[name] = value
                elif key.section.config is LegacyTrainingConfig and key.current and key.stored(value) is not None:
                    given.setdefault(key.current, key.stored(value))
        return TrainingKeys(MappingProxyType(given))

    def _apply_rules(self, writes: bool, begins: bool) -> None:
        """Add the broken rules. A key that is at fault already is not blamed again."""
        at_fault = {problem.key for problem in self.problems}
        for rule in broken_rules(self.command, self.run, writes=writes, unknown=self.unknown):
            if rule.only_warns or (rule.is_local and not begins):
                self.add((), [rule.problem()])
            elif rule.keys[0] not in at_fault:
                self.add([rule.problem()], ())
