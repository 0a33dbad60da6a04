"""`luthier eval`: measure the model of a run, and with `compare` tell how much better it is than another one.

compare: base      the model without what the run trained, on the same questions; its results go into save_dir/base
compare: FOLDER    the results in the save_dir of an earlier evaluation of any model
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from luthier.config.rules.eval_command import asks_learned_rows, kind_of, tasks_of
from luthier.core.errors import InvalidInput
from luthier.core.files import require_no_folder, write_atomically
from luthier.core.kinds import EVAL_KINDS
from luthier.core.log import info
from luthier.evals.results import BASE_FOLDER, COMPARISON_FILE, COMPARISON_LOG, SUMMARY_FILE, read_records
from luthier.evals.task import JudgedTask, Record
from luthier.model.loading.memory_check import enough_memory
from luthier.workflow.evaluate import (
    Measured,
    Side,
    as_trained,
    folder_of,
    luthier_version,
    measure,
    measure_all,
    open_root,
    open_task,
    save_together,
)

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.evals.report import Example, Line, Report

BASE = "base"
NUM_EXAMPLES = 3
"""Of each task, each way."""
LEARNED_ROWS = "The model was trained on these rows, so this does not tell how it answers new ones."
NUM_MANY = 5
MANY_LINES = "Of 20 intervals about one leaves out 0 by chance, so one clear metric among many says little."


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `luthier eval`."""

    tasks: Mapping[str, Measured]
    report: "Report | None" = None
    """The comparison, if one was asked for."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """That of the task, or {"tasks": {name: summary}} of several."""
        summaries = {name: one.summary for name, one in self.tasks.items()}
        return next(iter(summaries.values())) if len(summaries) == 1 else {"tasks": summaries}

    @property
    def records(self) -> Sequence[Record]:
        """Those of all tasks."""
        return [record for one in self.tasks.values() for record in one.records]

    @property
    def table(self) -> str:
        """What is printed."""
        from luthier.evals.report import as_text

        if self.report is not None:
            return as_text(self.report)
        tables = [(name, one.table) for name, one in self.tasks.items()]
        return tables[0][1] if len(tables) == 1 else "\n\n".join(f"{name}\n{table}" for name, table in tables)


@dataclass(frozen=True, slots=True)
class Other:
    """The results that those of the run are compared with."""

    records: Sequence[Record]
    hashes: Mapping[str, str]


def evaluate(run: "EvalRun") -> Evaluation:
    """Measure all tasks, and compare if the run asks for it. `luthier.evaluate` calls this."""
    if run.evaluation.compare is None:
        return Evaluation({one.name: one for one in measure_all(run)})
    return compare_models(run, run.evaluation.compare)


@enough_memory("take a smaller batch_size, quantization_bit: 4, or a smaller model")
def compare_models(run: "EvalRun", compare: str) -> Evaluation:
    """Everything that can be refused is refused before weights are loaded; then the base is measured, then the run."""
    names, root = tasks_of(run), open_root(run, COMPARISON_FILE)
    if run.evaluation.html is not None:
        require_no_folder("html", Path(run.evaluation.html))
    trained = as_trained(run)
    base = Side(base_of(run, trained)) if compare == BASE else None
    tuned = Side(trained)
    opened = [(name, *open_task(tuned, name)) for name in names]
    others: list[Other] = []
    for name in names:
        if base is None:
            others.append(saved(Path(compare), name, names))
        else:
            others.append(of_base(base, name, names, root))
    if base is not None:
        base.free()
    found = []
    for (name, task, questions), other in zip(opened, others, strict=True):
        if EVAL_KINDS.get(str(kind_of(name))).judges:
            cast(JudgedTask, task).against(other.records)
        require_same_questions(name, compare, task.hashes, other.hashes)
        folder = folder_of(root, name, names)
        found.append(measure(tuned, name, task, questions, folder, reuses=True))
    if root is not None and len(names) > 1:
        save_together(root, {one.name: one.summary for one in found})
    report = report_of(run, compare if base is None else base.name, tuned.name, found, others)
    save(run, report, root)
    return Evaluation({one.name: one for one in found}, report)


def base_of(run: "EvalRun", trained: "EvalRun") -> "EvalRun":
    """The run without what it trained: its model before training, or the model without its adapters."""
    if trained.model != run.model:
        return run
    if run.model.adapter_name_or_path:
        return replace(run, model=replace(run.model, adapter_name_or_path=()))
    raise InvalidInput(
        "compare: base: this run has no adapter and trains nothing, so it is its own base -> name the run file of the"
        " training, or adapter_name_or_path, or compare with the save_dir of another evaluation"
    )


def of_base(base: Side, name: str, names: Sequence[str], root: Path | None) -> Other:
    """The base's own results; for a task that compares answers, the answers of the base."""
    kind = EVAL_KINDS.get(str(kind_of(name)))
    own_name = "generation" if kind.judges else name
    task, questions = open_task(base, own_name)
    folder = folder_of(root, name, names)
    folder = None if folder is None else folder / BASE_FOLDER
    found = measure(base, own_name, task, questions, folder, reuses=True)
    return Other(found.records, dict(task.hashes))


def saved(folder: Path, name: str, names: Sequence[str]) -> Other:
    """The finished results of a task in a `save_dir`, which may hold one task or several. Raises `InvalidInput`."""
    own = folder_of(folder, name, names)
    assert own is not None
    for candidate in (own, folder, folder_of(folder, name, ("", ""))):
        assert candidate is not None
        try:
            summary = json.loads((candidate / SUMMARY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not (isinstance(summary, dict) and isinstance(summary.get("hashes"), dict)):
            continue
        measured = summary.get("task")
        judges = EVAL_KINDS.get(str(kind_of(name))).judges
        if measured == name or (judges and measured == "generation"):
            return Other(read_records(candidate), summary["hashes"])
    raise InvalidInput(
        f"compare: {folder} holds no finished results of {name} -> give the save_dir of an evaluation of this task"
    )


def require_same_questions(name: str, compare: str, own: Mapping[str, str], other: Mapping[str, str]) -> None:
    """Raises `InvalidInput` if a file or the rows that both have read differ."""
    for part in own.keys() & other.keys():
        if own[part] != other[part] and part != "other answers":
            raise InvalidInput(
                f"compare: {compare} answered other questions of {name} ({part} differ) -> evaluate both on the same"
                " data, and for perplexity with the same tokenizer and chat format"
            )


def report_of(run: "EvalRun", base: str, tuned: str, found: Sequence[Measured], others: Sequence[Other]) -> "Report":
    from luthier.evals.report import Report

    lines: list[Line] = []
    examples: list[Example] = []
    for one, other in zip(found, others, strict=True):
        lines += lines_of(one, other, run.evaluation.seed)
        examples += examples_of(one, other)
    notes = [LEARNED_ROWS] if asks_learned_rows(run) else []
    notes += [MANY_LINES] if len(lines) >= NUM_MANY else []
    return Report(base, tuned, lines, sorted(examples, key=lambda example: example.verdict), notes)


def lines_of(one: Measured, other: Other, seed: int) -> "Iterator[Line]":
    """One line for each metric of the task."""
    from luthier.evals.paired import compare
    from luthier.evals.report import Line

    kind = EVAL_KINDS.get(str(kind_of(one.name)))
    if kind.judges:
        yield Line(
            one.name,
            next(iter(one.task.measures(one.records))),
            "higher",
            cast(JudgedTask, one.task).judged(one.records),
        )
        return
    require_same_places(one, other)
    theirs = one.task.measures(other.records)
    for metric, own in one.task.measures(one.records).items():
        if metric in theirs:
            yield Line(one.name, metric, own.goal, compare(theirs[metric], own, seed))


def require_same_places(one: Measured, other: Other) -> None:
    own, theirs = ([(record.subject, record.index) for record in records] for records in (one.records, other.records))
    if own != theirs:
        raise InvalidInput(
            f"compare: the results of {one.name} are of other questions ({len(theirs):,}, not {len(own):,}) -> evaluate"
            " both on the same data"
        )


def examples_of(one: Measured, other: Other) -> "Iterator[Example]":
    """The questions that flipped most by the first metric of the task."""
    from luthier.evals.report import Example

    metric, gains = gains_of(one, other)
    for verdict, sign in (("better", 1), ("worse", -1)):
        flipped = [index for index, gain in enumerate(gains) if gain * sign > 0]
        for index in sorted(flipped, key=lambda index: -abs(gains[index]))[:NUM_EXAMPLES]:
            question, record = one.questions[index], one.records[index]
            own = one.task.example(question, record.values)
            base = _other_text(one, other, index)
            if own is None or base is None:
                return
            place = f"{record.subject} {record.index}".strip()
            texts = (own.question, own.reference, base, own.answer)
            yield Example(one.name, metric, verdict, place, *texts)  # type: ignore[arg-type]


def gains_of(one: Measured, other: Other) -> tuple[str, list[float]]:
    """By how much each question is better, by the first metric of both that differs at all."""
    judges = EVAL_KINDS.get(str(kind_of(one.name))).judges
    theirs = {} if judges else one.task.measures(other.records)
    for metric, own in one.task.measures(one.records).items():
        if judges:
            return metric, [float(score - 0.5) for score in own.scores]
        if metric not in theirs:
            continue
        sign = 1 if own.goal == "higher" else -1
        gains = [float(gain) for gain in sign * (own.scores - theirs[metric].scores)]
        if any(gains):
            return metric, gains
    return "", []


def _other_text(one: Measured, other: Other, index: int) -> str | None:
    values = one.records[index].values
    if "other" in values:
        return str(values["other"])
    shown = one.task.example(one.questions[index], other.records[index].values)
    return None if shown is None else shown.answer


def save(run: "EvalRun", report: "Report", root: Path | None) -> None:
    """comparison.json, comparison.log and the page."""
    from luthier.evals.report import as_text
    from luthier.evals.report_page import page

    if run.evaluation.html is not None:
        facts = {"tasks": ", ".join(tasks_of(run)), "seed": str(run.evaluation.seed), "luthier": luthier_version()}
        path = Path(run.evaluation.html)
        write_atomically(path, page(report, facts))
        info(f"page: {path}")
    if root is not None:
        write_atomically(root / COMPARISON_LOG, as_text(report) + "\n")
        write_atomically(root / COMPARISON_FILE, json.dumps(as_data(report), indent=2, ensure_ascii=False) + "\n")


def as_data(report: "Report") -> dict[str, Any]:
    """The report as JSON has it."""
    from dataclasses import asdict

    lines = [
        {"task": line.task, "metric": line.metric, "goal": line.goal, **asdict(line.found), "verdict": line.verdict}
        for line in report.lines
    ]
    return {"base": report.base, "tuned": report.tuned, "lines": lines, "examples": list(map(asdict, report.examples))}
