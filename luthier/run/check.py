"""`luthier check RUN`: check keys, the rules between keys, chat format and datasets, without importing torch."""

import sys
from collections.abc import Collection

from luthier.config.load import read_source
from luthier.config.runs import Run
from luthier.core.errors import InvalidInput, Problem
from luthier.workflow.preflight import load_checked

KINDS = {"train": "train", "chat": "infer", "export": "export"}
"""Value of `--for` -> kind of run file."""


def main(argv: list[str]) -> int:
    """Return 0 if the run can start; warnings go to stdout. Raises `ConfigError` with all problems otherwise."""
    words, kind = _split_kind(argv)
    if not words:
        raise InvalidInput("check: which run file? e.g. `luthier check run.yaml`")
    written = read_source(words)
    command = kind or guess_kind(written.entries)
    run = load_checked(command, written, begins=False)
    report(run, command, list(run.warnings))
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
    trains = ("dataset", "eval_dataset", "output_dir", "do_train", "do_eval", "do_predict")
    if any(key in keys for key in trains) or ("stage" in keys and "adapter_name_or_path" not in keys):
        return "train"
    return "infer"


def report(run: Run, command: str, warnings: list[Problem]) -> None:
    """Print the warnings and one summary line to stdout."""
    for warning in warnings:
        print(f"warning: {warning}")
    count = len(run.given)
    noted = f", {len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else ""
    what = f"stage {run.stage}, {run.finetuning_type}" if command == "train" else command
    print(f"{run.source}: {count} key{'s' * (count != 1)} fine{noted} ({what})")
    sys.stdout.flush()
