"""What `luthier eval` measures: a task has questions, and each answered question is one line of results.jsonl.

kind = EVAL_KINDS.get("multiple_choice")     a file in luthier/evals/tasks/
task = kind.open(run, "mmlu_test")
questions = task.questions(encoding)         read and checked before a model is loaded
records = task.score(model, questions[:8])   one record for each question, in order
task.summary(records)                        {"n": 8, "accuracy": 0.5, "standard_error": ...}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from luthier.config.rules.engine import NO_RULES, Rules

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.evals.measure import Measure
    from luthier.evals.model import EvalModel
    from luthier.evals.paired import PairedDifference


@dataclass(frozen=True, slots=True)
class Record:
    """One question with what the model made of it."""

    subject: str
    index: int
    """Of the question in its subject, counted from 0."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the task found, as JSON has it."""

    def as_json(self) -> dict[str, Any]:
        return {"subject": self.subject, "index": self.index, **self.values}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Record":
        """The record that `as_json` has written."""
        rest = {name: value for name, value in line.items() if name not in ("subject", "index")}
        return cls(line["subject"], line["index"], rest)


@dataclass(frozen=True, slots=True)
class Shown:
    """Texts for a reader."""

    question: str
    reference: str
    answer: str


class EvalTask(Protocol):
    """One task of a run. Its methods are called in the order in which they stand here."""

    def questions(self, encoding: "Encoding") -> Sequence[Any]:
        """All questions, in the order in which they are asked. Raises `InvalidInput` for files that cannot be used."""

    @property
    def hashes(self) -> Mapping[str, str]:
        """Name -> sha256 of what was read for the questions. Unfinished results go on only if they are the same."""

    @property
    def questions_at_once(self) -> int:
        """How many questions `score` is given at a time. Results are saved after each such group."""

    def score(self, model: "EvalModel", questions: Sequence[Any]) -> Sequence[Record]:
        """One record for each of these questions, in order. It must not depend on questions of earlier calls."""

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        """The metrics of these records, the most telling one first. Paired differences are made of these."""

    def example(self, question: Any, values: Mapping[str, Any]) -> "Shown | None":
        """A question with what the model made of it, for a reader; None if that tells nothing."""

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """What summary.json says of all records: `n`, metrics, `standard_error`."""

    def results(self, records: Sequence[Record]) -> Any:
        """The content of results.json."""

    def table(self, records: Sequence[Record]) -> str:
        """What is printed, and written to results.log."""


class JudgedTask(EvalTask, Protocol):
    """A task that compares answers with those of another model."""

    def against(self, records: Sequence[Record]) -> None:
        """Called before `score`, with the answers of the other model. Raises `InvalidInput` if these are none."""

    def judged(self, records: Sequence[Record]) -> "PairedDifference":
        """The comparison of the two models."""


@dataclass(frozen=True, kw_only=True)
class EvalKind:
    """A kind of task. The file in luthier/evals/tasks/ has its name."""

    name: str
    is_chosen: Callable[[str], bool]
    """(value of `task`) -> whether this kind measures it."""
    open: "Callable[[EvalRun, str], EvalTask]"
    """(run, the value of `task`) -> the task."""
    reads_rows: bool = False
    """Whether its questions are rows of the run's datasets, so that these must be there."""
    judges: bool = False
    """Whether it compares answers with those of another model by itself: the task is a `JudgedTask`."""
    in_training: bool = False
    """Whether `eval_tasks` may name it."""
    check: Rules = NO_RULES
