"""`luthier check RUN`: every key, the rules between keys, the chat format and the datasets, without importing torch."""

import sys
from collections.abc import Collection
from dataclasses import replace

from luthier.config.data import holds_tokenized_rows
from luthier.config.load import load, locate, read_source
from luthier.config.runs import Run, TrainRun
from luthier.config.source import Written
from luthier.core.errors import ConfigError, InvalidInput, Problem
from luthier.core.registry import nearest
from luthier.model.processor import text_only_problems
from luthier.run.named import named_problems
from luthier.run.start import library_problems, quantizer_problems, source_problems

KINDS = {"train": "train", "chat": "infer", "export": "export"}
"""Word after `--for` -> kind of run file."""


def main(argv: list[str]) -> int:
    """Exit status 0 if the run can start (warnings on stdout), 2 (raised) with all problems otherwise."""
    words, kind = _split_kind(argv)
    if not words:
        raise InvalidInput("check: which run file? e.g. `luthier check run.yaml`")
    written = read_source(words)
    command = kind or guess_kind(written.entries)
    run = load_checked(command, written, begins=False)
    report(run, command, list(run.warnings))
    return 0


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


def _split_kind(argv: list[str]) -> tuple[list[str], str | None]:
    words, kind = [], None
    rest = iter(argv)
    for word in rest:
        if word == "--for" or word.startswith("--for="):
            value = word.partition("=")[2] or next(rest, "")
            if value not in KINDS:
                raise InvalidInput(f"check: --for {value or '(nothing)'}: must be one of {', '.join(KINDS)}")
            kind = KINDS[value]
        else:
            words.append(word)
    return words, kind


def guess_kind(keys: Collection[str]) -> str:
    """The kind of run file that these keys belong to."""
    if "export_dir" in keys:
        return "export"
    trains = ("dataset", "eval_dataset", "output_dir", "do_train", "do_eval", "do_predict")
    if any(key in keys for key in trains) or ("stage" in keys and "adapter_name_or_path" not in keys):
        return "train"
    return "infer"


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
            close = nearest(name, known)
            remedy = f"did you mean {close}?" if close else "`luthier template list` names them"
            problems.append(Problem("template", "no chat format has this name", remedy))
    if isinstance(run, TrainRun) and not holds_tokenized_rows(run.data):
        from luthier.data.catalog import check_datasets

        problems_found, warnings_found = check_datasets(run.data, run.stage, others=others)
        problems += problems_found
        warnings += warnings_found
    return problems, warnings


def report(run: Run, command: str, warnings: list[Problem]) -> None:
    """What was found, on stdout."""
    for warning in warnings:
        print(f"warning: {warning}")
    count = len(run.given)
    noted = f", {len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else ""
    what = f"stage {run.stage}, {run.finetuning_type}" if command == "train" else command
    print(f"{run.source}: {count} key{'s' * (count != 1)} fine{noted} ({what})")
    sys.stdout.flush()
