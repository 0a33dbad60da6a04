"""`luthier check RUN`: check keys, the rules between keys, chat format and datasets, without importing torch."""

import sys
from collections.abc import Collection, Iterable

from luthier.config.load import read_source
from luthier.config.runs import TrainRun
from luthier.core.errors import ConfigError, InvalidInput, Problem
from luthier.workflow.launch.processes import num_processes_asked, require_allowed
from luthier.workflow.preflight import load_checked

KINDS = {"train": "train", "chat": "infer", "export": "export", "eval": "eval"}
"""Value of `--for` -> kind of run file."""


def main(argv: list[str]) -> int:
    """Return 0 if the run can start; warnings go to stdout. Raises `ConfigError` with all problems otherwise."""
    words, kind = _split_kind(argv)
    if not words:
        raise InvalidInput("check: which run file? e.g. `luthier check run.yaml`")
    written = read_source(words)
    command = kind or guess_kind(written.entries)
    try:
        run = load_checked(command, written, begins=False)
    except ConfigError as error:
        print_warnings(error.warnings)
        raise ConfigError(error.source, error.problems) from None
    if command == "train" and isinstance(run, TrainRun) and (num_processes := num_processes_asked(run)) is not None:
        require_allowed(run, written, num_processes)
    print_warnings(run.warnings)
    count, noted = len(run.given), len(run.warnings)
    told = f", {noted} warning{'s' * (noted != 1)}" if noted else ""
    what = f"stage {run.stage}, {run.finetuning_type}" if command == "train" else command
    print(f"{run.source}: {count} key{'s' * (count != 1)} fine{told} ({what})")
    return 0


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
    if "task" in keys:
        return "eval"
    trains = ("dataset", "eval_dataset", "output_dir", "do_train", "do_eval", "do_predict")
    if any(key in keys for key in trains) or ("stage" in keys and "adapter_name_or_path" not in keys):
        return "train"
    return "infer"


def print_warnings(warnings: Iterable[Problem]) -> None:
    """To stdout, before the problems on stderr."""
    for warning in warnings:
        print(f"warning: {warning}")
    sys.stdout.flush()
