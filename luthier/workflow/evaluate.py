"""Measures the model of a run: questions -> model -> one record for each question -> table and results.

Questions are read before weights are loaded, and each group of records is saved as soon as it is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.eval_command import kind_of
from luthier.core.errors import InvalidInput
from luthier.core.importing import without_collection
from luthier.core.kinds import EVAL_KINDS
from luthier.core.log import info
from luthier.core.versions import library_version
from luthier.evals.results import ResultsFolder
from luthier.evals.task import EvalTask, Record
from luthier.model.loading.memory_check import enough_memory
from luthier.workflow.text import TextSide, load_text_side

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.evals.model import EvalModel

NOT_IDENTITY = frozenset({"save_dir", "compare", "download_mode"})
"""Keys that do not change any record."""
LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `luthier eval`."""

    task: EvalTask
    records: Sequence[Record]
    summary: Mapping[str, Any]
    table: str


@enough_memory("take a smaller batch_size, quantization_bit: 4, or a smaller model")
def evaluate(run: "EvalRun") -> Evaluation:
    """Ask all questions of the task, or go on with unfinished results in save_dir. `luthier.evaluate` calls this."""
    assert run.evaluation.task is not None, "a rule demands it"
    run = as_trained(run)
    folder = None if run.evaluation.save_dir is None else Path(run.evaluation.save_dir)
    return measure(run, open_task(run), folder)


def open_task(run: "EvalRun") -> EvalTask:
    kind = kind_of(run.evaluation.task)
    assert kind is not None, "a rule demands it"
    task: EvalTask = EVAL_KINDS.get(kind).open(run)
    return task


def measure(run: "EvalRun", task: EvalTask, folder: Path | None) -> Evaluation:
    """All records of a task with the model of `run`, saved in `folder`."""
    with without_collection():
        text = load_text_side(run)
        questions = task.questions(text.encoding)
    hashes = dict(task.hashes)
    results = ResultsFolder(folder, {"keys": identity_of(run), "hashes": hashes})
    results.keep_groups_of(task.questions_at_once)
    if len(results.records) < len(questions):
        ask(task, load_eval_model(run, text), questions, results)
    records = results.records
    versions = {name: library_version(name) for name in LIBRARIES}
    summary = {
        "task": run.evaluation.task,
        "model": run.model.model_name_or_path,
        "adapters": list(run.model.adapter_name_or_path),
        **task.summary(records),
        "versions": {"luthier": luthier_version(), **versions},
        "hashes": hashes,
    }
    table = task.table(records)
    results.finish(task.results(records), table, summary)
    if folder is not None:
        info(f"results: {folder}")
    return Evaluation(task, records, summary, table)


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
        finally:
            results.close()


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


def identity_of(run: "EvalRun") -> dict[str, Any]:
    """The keys that decide the records."""
    return {key: value for key, value in sorted(run.given.items()) if key not in NOT_IDENTITY}


def as_trained(run: "EvalRun") -> "EvalRun":
    """The run file of a training run stands for what it trained: the adapter or the model in its output_dir."""
    output_dir, keys = run.training["output_dir"], run.model
    if not output_dir or not run.given.get("do_train"):
        return run
    folder = Path(output_dir)
    if (folder / "adapter_config.json").is_file():
        info(f"the model is that of the run, with the adapter in {folder}")
        return replace(run, model=replace(keys, adapter_name_or_path=(*keys.adapter_name_or_path, str(folder))))
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

        from luthier.evals.model import EvalModel
        from luthier.infer.decoding import end_ids
        from luthier.infer.reading import AnswerFormat
        from luthier.infer.types import Settings
        from luthier.model.backends import load_for_inference
        from luthier.model.embeddings import add_missing_rows
        from luthier.workflow.chat import prompting_of, thinking_tags

    model = load_for_inference(run, source=text.source)
    add_missing_rows(model, text.tokenizer, text.source)
    prompting = prompting_of(run, text)
    info(f"ready: {run.model.model_name_or_path}, prompts in {prompting.description}")
    return EvalModel(
        model=model,
        tokenizer=text.tokenizer,
        encoding=text.encoding,
        prompting=prompting,
        stop_ids=frozenset({*text.fitted.stop_token_ids, *end_ids(model)}),
        answer_format=AnswerFormat(thinking_tags(text), text.template.call_syntax),
        settings=Settings.of(run.generating, run.evaluation.seed),
        batch_size=run.evaluation.batch_size,
    )


def luthier_version() -> str:
    from luthier import __version__

    return __version__
