"""Measures the model of a run: questions -> model -> one record for each question -> table and results.

Questions are read before weights are loaded, and each group of records is saved as soon as it is there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.masking import is_secret
from luthier.config.rules.eval_command import kind_of, tasks_of
from luthier.core.errors import InvalidInput
from luthier.core.files import write_atomically
from luthier.core.importing import without_collection
from luthier.core.kinds import EVAL_KINDS
from luthier.core.log import info
from luthier.core.versions import library_version
from luthier.evals.results import SUMMARY_FILE, ResultsFolder, require_unfinished
from luthier.evals.task import EvalTask, Record
from luthier.model.loading.memory_check import enough_memory
from luthier.workflow.text import TextSide, load_text_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.config.runs import EvalRun
    from luthier.evals.model import EvalModel

NOT_IDENTITY = frozenset({"save_dir", "compare", "html", "download_mode"})
"""Keys that do not change any record."""
LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one task found."""

    name: str
    task: EvalTask
    questions: Sequence[Any]
    records: Sequence[Record]
    summary: Mapping[str, Any]
    table: str


class Side:
    """A model to measure. Its weights are loaded when a question is asked, since finished results need none."""

    def __init__(self, run: "EvalRun") -> None:
        self.run = run
        with without_collection():
            self.text = load_text_side(run)
        self._model: EvalModel | None = None

    @property
    def model(self) -> "EvalModel":
        if self._model is None:
            self._model = load_eval_model(self.run, self.text)
        return self._model

    def free(self) -> None:
        """Give back the memory of the weights."""
        self._model = None

    @property
    def name(self) -> str:
        return " + ".join([self.run.model.model_name_or_path or "", *self.run.model.adapter_name_or_path])


@enough_memory("take a smaller batch_size, quantization_bit: 4, or a smaller model")
def measure_all(run: "EvalRun") -> list[Measured]:
    """Ask all questions of all tasks, or resume unfinished results in save_dir."""
    side, names = Side(as_trained(run)), tasks_of(run)
    root = open_root(run)
    opened = [(name, *open_task(side, name)) for name in names]
    found = [
        measure(side, name, task, questions, folder_of(root, name, names), reuses=len(names) > 1)
        for name, task, questions in opened
    ]
    if root is not None and len(names) > 1:
        save_together(root, {one.name: one.summary for one in found})
    return found


def open_task(side: Side, name: str) -> tuple[EvalTask, Sequence[Any]]:
    """A task and its questions. Raises `InvalidInput` for questions that cannot be read."""
    kind = kind_of(name)
    assert kind is not None, "a rule demands it"
    task: EvalTask = EVAL_KINDS.get(kind).open(side.run, name)
    with without_collection():
        return task, task.questions(side.text.encoding)


def open_root(run: "EvalRun", marker: str = SUMMARY_FILE) -> Path | None:
    """The folder save_dir. Raises `OutputError` if it holds finished results, of which `marker` is the last file."""
    save_dir = run.evaluation.save_dir
    if save_dir is None:
        return None
    require_unfinished(Path(save_dir), marker)
    return Path(save_dir)


def folder_of(root: Path | None, name: str, names: Sequence[str]) -> Path | None:
    """Where a task saves its results: in save_dir itself, or in a folder of its own there if there are several."""
    if root is None or len(names) == 1:
        return root
    return root / name.replace("/", "_").replace(",", "_")


def save_together(root: Path, summaries: Mapping[str, Any]) -> None:
    """The summary of several tasks."""
    text = json.dumps({"tasks": summaries}, indent=2, ensure_ascii=False)
    write_atomically(root / SUMMARY_FILE, text + "\n")


def measure(
    side: Side, name: str, task: EvalTask, questions: Sequence[Any], folder: Path | None, *, reuses: bool = False
) -> Measured:
    """All records of a task, saved in `folder`. `reuses`: results there may be finished, and are only read then."""
    run, hashes = side.run, dict(task.hashes)
    identity = {"keys": keys_of(run, name), "hashes": hashes, "model": model_files(run)}
    results = ResultsFolder(folder, identity, reuses=reuses)
    is_finished = results.is_finished
    if not is_finished:
        results.keep_groups(task.questions_at_once, len(questions))
    if len(results.records) < len(questions):
        ask(task, side.model, questions, results)
    records = results.records
    versions = {library: library_version(library) for library in LIBRARIES}
    summary = {
        "task": name,
        "model": run.model.model_name_or_path,
        "adapters": list(run.model.adapter_name_or_path),
        **task.summary(records),
        "versions": {"luthier": luthier_version(), **versions},
        "hashes": hashes,
    }
    table = task.table(records)
    if not is_finished:
        results.finish(task.results(records), table, summary)
    if folder is not None:
        info(f"results: {folder}")
    return Measured(name, task, questions, records, summary, table)


def ask(task: EvalTask, model: "EvalModel", questions: Sequence[Any], results: ResultsFolder) -> None:
    """Ask the questions that have no record yet, one group after the other."""
    done, size = len(results.records), task.questions_at_once
    if done:
        info(f"{done:,} of {len(questions):,} questions are answered already")
    with progress(len(questions), done) as advance:
        try:
            for start in range(done, len(questions), size):
                records = task.score(model, questions[start : start + size])
                results.add(records)
                advance(len(records))
        except KeyboardInterrupt:
            if results.folder is not None:
                info(f"{len(results.records):,} of {len(questions):,} answers are kept; the same command goes on")
            raise


@contextmanager
def progress(total: int, done: int) -> Iterator[Any]:
    """A bar on stderr if that is a terminal. Yields a function that takes the number of newly answered questions."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress("questions", *columns, console=console) as bar:
        line = bar.add_task("questions", total=total, completed=done)
        yield lambda count: bar.advance(line, count)


def keys_of(run: "EvalRun", task: str) -> dict[str, Any]:
    """The keys that decide the records of a task. They are saved, so tokens and passwords are not among them."""
    keys = {key: value for key, value in run.given.items() if key not in NOT_IDENTITY and not is_secret(key)}
    return dict(sorted({**keys, "task": task}.items()))


def model_files(run: "EvalRun") -> dict[str, list[int]]:
    """Each file of a local model and its adapters -> its size in bytes and when it was written, in nanoseconds."""
    found = {}
    for name in (run.model.model_name_or_path, *run.model.adapter_name_or_path):
        path = Path(name)
        for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []:
            if file.is_file():
                state = file.stat()
                found[str(file)] = [state.st_size, state.st_mtime_ns]
    return found


def as_trained(run: "EvalRun") -> "EvalRun":
    """The run file of a training run stands for what it trained: the adapter or the model in its output_dir.

    Raises `InvalidInput` if that has not been trained yet.
    """
    output_dir, keys = run.training["output_dir"], run.model
    adapters = keys.adapter_name_or_path
    if not output_dir or not run.given.get("do_train"):
        return run
    folder = Path(output_dir)
    if any(Path(name).resolve().is_relative_to(folder.resolve()) for name in adapters):
        return run  # the command line has chosen a checkpoint
    if (folder / "adapter_config.json").is_file():
        info(f"the model is that of the run, with the adapter in {folder}")
        kept = adapters if run.given.get("create_new_adapter") else adapters[:-1]
        return replace(run, model=replace(keys, adapter_name_or_path=(*kept, str(folder))))
    if (folder / "config.json").is_file():
        info(f"the model is what the run trained, in {folder}")
        return replace(run, model=replace(keys, model_name_or_path=str(folder), adapter_name_or_path=()))
    raise InvalidInput(
        f"output_dir: {folder} holds no model: this run has not been trained -> train it, or set do_train: false"
    )


def load_eval_model(run: "EvalRun", text: TextSide) -> "EvalModel":
    """Load the weights of a run, in evaluation mode."""
    with without_collection():
        import peft  # noqa: F401  # with the models of transformers, which are loaded next

        from luthier.model.backends import load_for_inference
        from luthier.model.embeddings import add_missing_rows

    model = load_for_inference(run, source=text.source)
    add_missing_rows(model, text.tokenizer, text.source)
    found = as_eval_model(run, model, text)
    info(f"ready: {run.model.model_name_or_path}, prompts in {found.prompting.description}")
    return found


def as_eval_model(run: "EvalRun", model: "PreTrainedModel", text: TextSide) -> "EvalModel":
    """A loaded model as tasks ask it."""
    from luthier.evals.model import EvalModel
    from luthier.infer.decoding import end_ids
    from luthier.infer.reading import AnswerFormat
    from luthier.infer.types import Settings
    from luthier.workflow.chat import prompting_of, thinking_tags

    return EvalModel(
        model=model,
        tokenizer=text.tokenizer,
        encoding=text.encoding,
        prompting=prompting_of(run, text),
        stop_ids=frozenset({*text.fitted.stop_token_ids, *end_ids(model)}),
        answer_format=AnswerFormat(thinking_tags(text), text.template.call_syntax),
        settings=Settings.of(run.generating, run.evaluation.seed),
        batch_size=run.evaluation.batch_size,
        fast_path=run.model.fast_path,
    )


def luthier_version() -> str:
    from luthier import __version__

    return __version__
