"""What a command refuses about its folders once it has begun, for `luthier check`: where it would write, and the
checkpoint that it would resume from.

Nothing is written, and no file is hashed: that a file of a checkpoint holds other bytes of the same number is found out
when training begins.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.bridge import under_megatron
from luthier.config.runs import EvalRun, ExportRun, Run, TrainRun
from luthier.core.errors import OutputError, Problem
from luthier.core.files import require_apart, require_no_file, require_no_folder
from luthier.evals.results import COMPARISON_FILE, SUMMARY_FILE, require_unfinished
from luthier.training.checkpoints.store import NoCheckpoint, checkpoints_in, find_resume_point
from luthier.workflow.export import require_unused

RESUME = "resume_from_checkpoint"


def output_problems(run: Run) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings): what is here stands in the way, and what is missing may be on another machine."""
    errors: list[Problem] = []
    warnings: list[Problem] = []
    if isinstance(run, EvalRun):
        _evaluation_problems(run, errors, warnings)
    elif isinstance(run, TrainRun):
        _training_problems(run, errors, warnings)
    elif isinstance(run, ExportRun) and run.export.export_dir:
        folder = Path(run.export.export_dir)
        model = run.model
        errors += _refused(
            "export_dir", lambda: require_unused(folder, model.model_name_or_path, model.adapter_name_or_path)
        )
        _place_problems("export_dir", folder, errors, warnings)
    return errors, warnings


def _training_problems(run: TrainRun, errors: list[Problem], warnings: list[Problem]) -> None:
    if run.data.tokenized_path is not None and not holds_tokenized_rows(run.data):
        _place_problems("tokenized_path", Path(run.data.tokenized_path), errors, warnings)
    if not run.training["output_dir"]:
        return
    output_dir = Path(run.training["output_dir"])
    checkpoint = None
    if run.trains and not under_megatron(run):
        requested, overwrite = run.training[RESUME], run.training["overwrite_output_dir"]
        try:
            checkpoint, notes = find_resume_point(output_dir, requested, overwrite, hashes=False)
            warnings += [Problem("output_dir", *_parts(note)) for note in notes]
        except NoCheckpoint:
            pass  # `checkpoint_problems` tells it, also to a run that begins
        except OutputError as error:
            errors.append(problem_of(RESUME if str(error).startswith(RESUME) else "output_dir", error))
    if run.trains and checkpoint is None:
        sources = (run.model.model_name_or_path, *run.model.adapter_name_or_path)
        for folder in (output_dir, *checkpoints_in(output_dir)):
            errors += _refused("output_dir", partial(require_apart, "output_dir", folder, sources))
    _place_problems("output_dir", output_dir, errors, warnings)


def _evaluation_problems(run: EvalRun, errors: list[Problem], warnings: list[Problem]) -> None:
    if run.evaluation.save_dir is not None:
        folder, compares = Path(run.evaluation.save_dir), run.evaluation.compare is not None
        marker = COMPARISON_FILE if compares else SUMMARY_FILE
        errors += _refused("save_dir", lambda: require_unfinished(folder, marker))
        _place_problems("save_dir", folder, errors, warnings)
    if run.evaluation.html is not None:
        page = Path(run.evaluation.html)
        errors += _refused("html", lambda: require_no_folder("html", page))


def _place_problems(key: str, folder: Path, errors: list[Problem], warnings: list[Problem]) -> None:
    """A file where a folder is to be, and a place where this user may not write."""
    errors += _refused(key, lambda: require_no_file(key, folder))
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if above.is_file() and above != folder.absolute():
        errors.append(Problem(key, f"nothing can be written there ({above} is a file)", "choose another folder"))
    elif above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        reason = f"nothing can be written there (this user may not write to {above})"
        warnings.append(Problem(key, reason, "choose another folder"))


def _refused(key: str, check: Callable[[], None]) -> Iterator[Problem]:
    """The problem that `check` raises, if any."""
    try:
        check()
    except OutputError as error:
        yield problem_of(key, error)


def problem_of(key: str, error: OutputError) -> Problem:
    """An error that begins with its key."""
    return Problem(key, *_parts(str(error).removeprefix(f"{key}: ")))


def _parts(text: str) -> tuple[str, str]:
    """Reason and remedy."""
    reason, _, remedy = text.partition(" -> ")
    return reason, remedy
