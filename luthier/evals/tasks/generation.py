"""`task: generation`: the model answers the prompts of the run's rows, and `metrics` compare with the answers there.

The prompts are those of `predict_with_generate`: the last answer of a conversation is asked for. Thoughts are told
apart and not compared. With `tool_call` among the metrics, calls are told apart from the words around them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.data import has_rows
from luthier.config.rules.engine import Rule, Rules
from luthier.core.errors import DataError
from luthier.core.kinds import STAGES
from luthier.evals.task import EvalKind, EvalTask, Record, Shown

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.evals.measure import Measure
    from luthier.evals.metrics import Classes, Reply
    from luthier.evals.model import EvalModel, Read

NAME = "generation"


@dataclass(frozen=True, slots=True)
class PromptQuestion:
    subject: str
    """The dataset, or empty for rows of several."""
    index: int
    prompt: list[int]
    reference: list[int]
    text: str
    """The prompt as a reader sees it, without special tokens."""


class Generation:
    def __init__(self, run: "EvalRun") -> None:
        self.run = run
        self.metrics = run.evaluation.metrics
        self.questions_at_once = run.evaluation.batch_size * 4
        self.hashes: dict[str, str] = {}

    def questions(self, encoding: "Encoding") -> Sequence[PromptQuestion]:
        from luthier.data.chat.answers import split_thought
        from luthier.evals.metrics import Reply, fault_of
        from luthier.model.tokenizer import special_pattern, special_texts

        self.hashes, found = prompt_questions(self.run, encoding)
        tokenizer, tags = encoding.encoder.tokenizer, encoding.template.thinking_tags
        special = special_pattern(special_texts(tokenizer))
        for question in found:
            words = split_thought(str(tokenizer.decode(question.reference)), tags)[1]  # the tags may be special tokens
            fault = fault_of(self.metrics, Reply(special.sub("", words)))
            if fault is not None:
                where = f"{question.subject} row {question.index}".strip()
                raise DataError(f"metrics: the answer of {where} {fault} -> correct the row, or choose other metrics")
        return found

    def score(self, model: "EvalModel", questions: Sequence[PromptQuestion]) -> Sequence[Record]:
        from luthier.evals.metrics import scores_of

        records = []
        answers = model.answers([question.prompt for question in questions])
        for question, text in zip(questions, answers, strict=True):
            wanted, reference = self._read(model, question, model.reference(question.reference))
            read, answer = self._read(model, question, text)
            scores = scores_of(self.metrics, answer, reference)
            values: dict[str, Any] = {"prompt": question.text, **as_values("answer", read)}
            values |= {**as_values("reference", wanted), "scores": scores}
            records.append(Record(question.subject, question.index, values))
        return records

    def _read(self, model: "EvalModel", question: PromptQuestion, text: str) -> "tuple[Read, Reply]":
        from luthier.evals.metrics import Reply

        read = model.read(text, question.prompt, with_calls="tool_call" in self.metrics)
        return read, Reply(read.words, read.calls)

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        from luthier.evals.metrics import measures

        return measures(self.metrics, [record.values["scores"] for record in records], classes_of(records))

    def example(self, question: PromptQuestion, values: Mapping[str, Any]) -> Shown:
        return Shown(question.text, shown_text("reference", values), shown_text("answer", values))

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        from luthier.evals.metrics import CLASS_METRICS

        measures = self.measures(records)
        found = {
            "n": len(records),
            **{name: measure.value for name, measure in measures.items()},
            "standard_error": {name: measure.standard_error for name, measure in measures.items()},
        }
        return found | ({"classes": classes_of(records).table()} if {*CLASS_METRICS} & set(self.metrics) else {})

    def results(self, records: Sequence[Record]) -> Any:
        """{dataset: {number of the row: answer}}"""
        found: dict[str, dict[str, str]] = {}
        for record in records:
            found.setdefault(record.subject, {})[str(record.index)] = record.values["answer"]
        return found

    def table(self, records: Sequence[Record]) -> str:
        lines = [f"{'metric':<24} {'value':>9} {'±':>9} {'n':>7}"]
        for name, measure in self.measures(records).items():
            error = "" if measure.standard_error is None else f"{measure.standard_error:.4f}"
            lines.append(f"{name:<24} {measure.value:>9.4f} {error:>9} {measure.num_questions:>7,}")
        return "\n".join(lines)


def prompt_questions(run: "EvalRun", encoding: "Encoding") -> tuple[dict[str, str], list[PromptQuestion]]:
    """The prompts of the rows that are evaluated, and a hash of the text of each dataset's reference answers."""
    from luthier.evals.rows import evaluated_rows

    tokenizer = encoding.encoder.tokenizer
    hashes, found = {}, []
    for name, rows in evaluated_rows(run, encoding, with_prompts=True).prompts.items():
        digest = hashlib.sha256()
        for index in range(len(rows)):
            row = rows[index]
            text = str(tokenizer.decode(row["input_ids"], skip_special_tokens=True)).strip()
            found.append(PromptQuestion(name, index, list(row["input_ids"]), list(row["labels"]), text))
            reference = str(tokenizer.decode(row["labels"], skip_special_tokens=True))
            digest.update(reference.strip().encode() + b"\0")
        hashes[f"references {name}".strip()] = digest.hexdigest()
    return hashes, found


def as_values(name: str, read: "Read") -> dict[str, Any]:
    """The parts of an answer as a record has them."""
    values: dict[str, Any] = {name: read.words}
    if read.thought:
        values[f"{name}_thought"] = read.thought
    if read.calls:
        values[f"{name}_calls"] = [{"name": call.name, "arguments": call.arguments} for call in read.calls]
    return values


def shown_text(name: str, values: Mapping[str, Any]) -> str:
    """The words of an answer in a record, then its calls."""
    import json

    calls = [json.dumps(call, ensure_ascii=False) for call in values.get(f"{name}_calls", ())]
    return "\n".join([values[name], *calls]).strip()


def classes_of(records: Sequence[Record]) -> "Classes":
    from luthier.evals.metrics import Classes

    answers = [record.values["answer"] for record in records]
    return Classes(answers, [record.values["reference"] for record in records])


def open_task(run: "EvalRun", task: str) -> EvalTask:
    return Generation(run)


ROW_RULES = (
    Rule(
        ("dataset", "eval_dataset", "task"),
        "is missing, and its prompts are what the model answers",
        "give names from dataset_info.json in dataset or eval_dataset",
        lambda run: not has_rows(run) and not run.data.eval_dataset,
    ),
    Rule(
        ("stage", "task"),
        "has rows without one answer each, and answers are compared with those of the rows",
        "set stage: sft, with a dataset for it",
        lambda run: STAGES.get(run.stage).rows.name != "dialogues",
    ),
)
"""Of the tasks that ask for the last answers of conversations."""

KIND = EvalKind(
    name=NAME,
    is_chosen=lambda task: task == NAME,
    open=open_task,
    reads_rows=True,
    in_training=True,
    check=Rules(ROW_RULES),
)
