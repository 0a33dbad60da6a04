"""Everything that can be checked before a run begins, without importing torch: its keys, and what they point to."""

from dataclasses import replace

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.load import load, locate
from luthier.config.runs import Run, TrainRun
from luthier.config.source import Written
from luthier.core.errors import ConfigError, Problem
from luthier.core.registry import did_you_mean
from luthier.model.processor import text_only_problems
from luthier.workflow.named import named_problems
from luthier.workflow.requirements import library_problems, quantizer_problems, source_problems


def load_checked(command: str, written: Written, *, begins: bool, writes: bool = True) -> Run:
    """The run, with what its keys point to checked as well. Raises `ConfigError` with all problems.

    `begins`: the run starts now, so its model and libraries must be here; else they may be on another machine.
    `writes` false: the run is only looked at, so it needs no folder to write to.
    """
    run = load(command, written, writes=writes)
    problems, warnings = content_problems(run, others=not begins)
    warnings += text_only_problems(run)
    if begins:
        problems += source_problems(run)
        problems += quantizer_problems(run)
        if isinstance(run, TrainRun):
            problems += library_problems(run)
            problems += named_problems(run)
    else:
        warnings += source_problems(run)
        warnings += named_problems(run) if isinstance(run, TrainRun) else ()
    if problems:
        raise ConfigError(written.source, [locate(problem, written) for problem in problems])
    return replace(run, warnings=(*run.warnings, *(locate(warning, written) for warning in warnings)))


def content_problems(run: Run, *, others: bool) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings) in what the keys point to: the chat format, and the datasets of a training run.

    `others`: tell what is wrong with datasets that this run does not use, too.
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
    if isinstance(run, TrainRun) and not holds_tokenized_rows(run.data):
        from luthier.data.sources.catalog import check_datasets

        problems_found, warnings_found = check_datasets(run.data, run.stage, others=others)
        problems += problems_found
        warnings += warnings_found
    return problems, warnings
