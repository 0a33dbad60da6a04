"""Everything that can be checked before a run begins, without importing torch: its keys, and what they point to."""

from collections.abc import Collection, Iterator

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.keys.fsdp import LAYERS, SMALLEST, fsdp_settings
from luthier.config.keys.training import read_mapping
from luthier.config.load import PATHS, Draft
from luthier.config.rules.eval_command import kinds_of
from luthier.config.runs import EvalRun, Run, TrainRun
from luthier.config.source import Written
from luthier.core.errors import InvalidInput, Problem
from luthier.core.kinds import EVAL_KINDS
from luthier.core.log import warn
from luthier.core.paths import windows_remedy
from luthier.core.registry import did_you_mean
from luthier.model.adapters._continued import local_problems
from luthier.model.media.processor import text_only_problems
from luthier.workflow.preflight.frozen_models import frozen_model_problems
from luthier.workflow.preflight.media import media_problems
from luthier.workflow.preflight.output import output_problems
from luthier.workflow.preflight.requirements import (
    checkpoint_problems,
    engine_problems,
    library_problems,
    quantizer_problems,
    source_problems,
    token_file_problems,
)

MUST_EXIST = {"model_name_or_path", "dataset_dir", "deepspeed", "fsdp_config", "accelerator_config"}
"""Paths whose absence is an error of its own."""


def load_checked(command: str, written: Written, *, begins: bool, writes: bool = True) -> Run:
    """The run, with what its keys point to checked as well.

    Raises `ConfigError` once, with all problems of the keys and of what they point to, and with all warnings.
    `begins`: the run starts now, so its model and libraries must be here; otherwise they may be on another machine, and
    what is missing is a warning. `writes` false: the run is only inspected, so it needs no output folder.
    """
    draft = Draft(command, written, writes=writes, begins=begins)
    run = draft.run
    draft.add(*content_problems(run, draft.unknown, others=not begins))
    trained = run if isinstance(run, TrainRun) and not isinstance(run, EvalRun) else None
    if trained is not None:
        draft.add(*settings_problems(trained))
    draft.add((), [*text_only_problems(run), *path_problems(run)])
    missing = [*source_problems(run), *token_file_problems(run), *quantizer_problems(run), *engine_problems(run)]
    if not begins and writes:
        draft.add(*output_problems(run))
    if trained is not None:
        missing += [*library_problems(trained), *frozen_model_problems(trained), *checkpoint_problems(trained)]
        draft.add((), local_problems(trained))
        if writes and not draft.unknown & {"stage", "dataset_dir", "dataset", "eval_dataset", "tokenized_path"}:
            refused, absent = media_problems(trained)
            draft.add(refused, ())
            missing += absent
    draft.add(missing if begins else (), () if begins else missing)
    return draft.finish()


def tell_warnings(run: Run) -> None:
    """Log what was found in the keys of a run that begins all the same."""
    for warning in run.warnings:
        warn(str(warning))


def content_problems(run: Run, unknown: Collection[str], *, others: bool) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings) in what the keys point to: the chat format, and the datasets of a training run.

    `unknown`: keys whose value is unknown; what depends on them is not checked. `others`: also report what is wrong
    with datasets that this run does not use.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    name = run.data.template
    if name not in (None, "auto"):
        from luthier.data.templates import template_names

        known = template_names()
        if name not in known:
            remedy = did_you_mean(name, known) or "`luthier template list` names them"
            problems.append(Problem("template", "no chat format has this name", remedy))
    if reads_datasets(run) and "dataset_dir" not in unknown and not holds_tokenized_rows(run.data):
        from luthier.data.sources.catalog import check_datasets

        stage = None if "stage" in unknown else run.stage
        problems_found, warnings_found = check_datasets(run.data, stage, others=others)
        problems += problems_found
        warnings += warnings_found
    return problems, warnings


def reads_datasets(run: Run) -> bool:
    if isinstance(run, EvalRun):
        return any(EVAL_KINDS.get(kind).reads_rows for kind in kinds_of(run))
    return isinstance(run, TrainRun)


def path_problems(run: Run) -> Iterator[Problem]:
    """Paths of Windows in keys whose folders need not exist: here they would name one folder with a strange name."""
    for key in sorted(PATHS & run.given.keys()):
        value = run.given[key]
        if isinstance(value, str) and key not in MUST_EXIST and (remedy := windows_remedy(value)):
            yield Problem(key, "holds a backslash, which is part of the name here", remedy)


def settings_problems(run: TrainRun) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings) in the files that hold settings for accelerate, DeepSpeed and FSDP, and in those of FSDP."""
    problems: list[Problem] = []
    contents = {}
    for key in ("accelerator_config", "deepspeed", "fsdp_config"):
        try:
            contents[key] = read_mapping(key, run.training[key])
        except InvalidInput as error:
            reason, _, remedy = str(error).removeprefix(f"{key}: {run.training[key]}: ").partition(" -> ")
            problems.append(Problem(key, reason, remedy))
    if not run.training["fsdp"]:
        unread = [key for key in ("fsdp_config", LAYERS, SMALLEST) if run.training[key]]
        return problems, [Problem(key, "is not read without fsdp", "set fsdp: true, or leave it out") for key in unread]
    if "fsdp_config" not in contents:
        return problems, []
    settings = fsdp_settings(run.training, contents["fsdp_config"])
    return problems + settings.problems, settings.warnings
