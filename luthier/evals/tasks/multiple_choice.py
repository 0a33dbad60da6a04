"""`task: mmlu_test` and the like: which letter is most likely after a multiple-choice question?

The question and its choices are a user message, after solved examples as earlier turns, in the chat format of the run.
The prediction is the choice with the largest log-probability, log softmax(logits)[letter] over the whole vocabulary.
The solved examples of a subject are drawn once, by `seed`; the model reads them once for all questions.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.evals.question_files import NAME, Question, Subject, read_benchmark
from luthier.evals.task import EvalKind, EvalTask, Record, Shown

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.evals.measure import Measure
    from luthier.evals.model import EvalModel

CATEGORIES = ("STEM", "Social Sciences", "Humanities", "Other")
AVERAGE = "Average"


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around a question."""

    intro: str
    """Before the first question."""
    answer: str
    """After the choices."""


WORDINGS = {
    "en": Wording("The following are multiple choice questions (with answers) about {subject}.\n\n", "\nAnswer:"),
    "zh": Wording("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案："),
}


@dataclass(frozen=True, slots=True)
class Asking:
    """A question of a subject, with the solved examples before it."""

    subject: Subject
    index: int
    question: Question
    examples: tuple[Question, ...]


class MultipleChoice:
    def __init__(self, run: "EvalRun", task: str) -> None:
        self.name, self.keys, self.max_samples = task, run.evaluation, run.data.max_samples
        self.questions_at_once = self.keys.batch_size
        self.hashes: Mapping[str, str] = {}
        self._category_of: dict[str, str] = {}
        self._beginnings: dict[str, tuple[int, ...]] = {}
        """Subject -> the tokens that all its prompts begin with."""

    def questions(self, encoding: "Encoding") -> Sequence[Asking]:
        with_examples = self.keys.n_shot > 0
        benchmark = read_benchmark(Path(self.keys.task_dir), self.name, with_examples=with_examples)
        self.hashes = benchmark.hashes
        self._category_of = {subject.key: subject.category for subject in benchmark.subjects}
        return [asking for subject in benchmark.subjects for asking in self._askings(subject)]

    def _askings(self, subject: Subject) -> list[Asking]:
        draw = random.Random(f"{self.keys.seed} {subject.key}")
        examples = tuple(draw.sample(subject.examples, min(self.keys.n_shot, len(subject.examples))))
        chosen = subject.questions[: self.max_samples]
        return [Asking(subject, index, question, examples) for index, question in enumerate(chosen)]

    def score(self, model: "EvalModel", questions: Sequence[Asking]) -> Sequence[Record]:
        return [
            record
            for _, group in groupby(questions, key=lambda asking: asking.subject.key)
            for record in self._score_subject(model, list(group))
        ]

    def _score_subject(self, model: "EvalModel", askings: list[Asking]) -> list[Record]:
        prompts = [self._prompt(model, asking) for asking in askings]
        letters = [[_letter_id(model, letter) for letter in asking.question.letters] for asking in askings]
        beginning = self._beginning(model, askings[0])
        found = model.scorer.letter_logprobs([ids for ids, _ in prompts], letters, beginning)
        return [
            _record(asking, logprobs, num_examples)
            for asking, logprobs, (_, num_examples) in zip(askings, found, prompts, strict=True)
        ]

    def _prompt(self, model: "EvalModel", asking: Asking) -> tuple[list[int], int]:
        """The token ids, and how many solved examples fit before the question."""
        for count in range(len(asking.examples), -1, -1):
            ids = self._prompt_ids(model, asking.subject, asking.question, asking.examples[:count])
            if model.num_positions is None or len(ids) <= model.num_positions or not count:
                return ids, count
        raise AssertionError("the loop ends with no examples")

    def _prompt_ids(
        self, model: "EvalModel", subject: Subject, question: Question, examples: Sequence[Question]
    ) -> list[int]:
        from luthier.data.types import Message
        from luthier.evals.model import Asked

        wording = WORDINGS[self.keys.lang]
        turns = [
            message
            for example in examples
            for message in (Message("user", _as_text(example, wording)), Message("assistant", example.answer))
        ]
        turns.append(Message("user", _as_text(question, wording)))
        first = Message("user", wording.intro.format(subject=subject.name) + turns[0].content)
        return model.prompt_ids(Asked((first, *turns[1:])))

    def _beginning(self, model: "EvalModel", asking: Asking) -> tuple[int, ...]:
        """Where the prompts of two questions of the subject part. It does not depend on which questions are asked."""
        from luthier.evals.scorer import shared_beginning

        subject = asking.subject
        if subject.key not in self._beginnings:
            prompts = [
                tuple(self._prompt_ids(model, subject, question, asking.examples)) for question in subject.questions[:2]
            ]
            self._beginnings[subject.key] = shared_beginning(prompts) if len(prompts) > 1 else ()
        return self._beginnings[subject.key]

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        from luthier.evals.measure import mean_of

        return {"accuracy": mean_of([_is_right(record) for record in records])}

    def example(self, question: Asking, values: Mapping[str, Any]) -> Shown:
        text = _as_text(question.question, WORDINGS[self.keys.lang])
        return Shown(text, values["answer"], values["predicted"])

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        by_category = {category: self._accuracy(chosen) for category, chosen in self._categories(records)}
        dropped = sum(record.values["num_dropped_examples"] for record in records)
        return {**by_category.pop(AVERAGE), "num_dropped_examples": dropped, "categories": by_category}

    def _accuracy(self, records: Sequence[Record]) -> dict[str, Any]:
        """`standard_error`: of the mean of n zeros and ones, sqrt(p (1 - p) / (n - 1))."""
        n = len(records)
        accuracy = sum(map(_is_right, records)) / n
        error = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None
        return {"n": n, "accuracy": accuracy, "standard_error": error}

    def _categories(self, records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
        """The records of each category, those of the reference first, and of all together."""
        own = dict.fromkeys((*CATEGORIES, *self._category_of.values()))
        found = [(name, [one for one in records if self._category_of[one.subject] == name]) for name in own]
        return [*((name, chosen) for name, chosen in found if chosen), (AVERAGE, list(records))]

    def results(self, records: Sequence[Record]) -> Any:
        found: dict[str, dict[str, str]] = {}
        for record in records:
            found.setdefault(record.subject, {})[str(record.index)] = record.values["predicted"]
        return found

    def table(self, records: Sequence[Record]) -> str:
        """Accuracy in percent, as `Average: 41.67 ± 3.10 (252 questions)`."""
        lines = []
        for category, chosen in self._categories(records):
            found = self._accuracy(chosen)
            error = "" if found["standard_error"] is None else f" ± {100 * found['standard_error']:.2f}"
            noun = "question" if found["n"] == 1 else "questions"
            lines.append(f"{category:>15}: {100 * found['accuracy']:.2f}{error} ({found['n']:,} {noun})")
        return "\n".join(lines)


def _is_right(record: Record) -> bool:
    return bool(record.values["predicted"] == record.values["answer"])


def _as_text(question: Question, wording: Wording) -> str:
    choices = zip(question.letters, question.choices, strict=True)
    return question.text + "".join(f"\n{letter}. {choice}" for letter, choice in choices) + wording.answer


def _letter_id(model: "EvalModel", letter: str) -> int:
    """The token of a letter that begins a text; tokenizers may put a mark of the beginning before it."""
    return int(model.tokenizer.encode(letter, add_special_tokens=False)[-1])


def _record(asking: Asking, logprobs: Sequence[float], num_examples: int) -> Record:
    loglikelihoods = dict(zip(asking.question.letters, logprobs, strict=True))
    return Record(
        asking.subject.key,
        asking.index,
        {
            "loglikelihoods": loglikelihoods,
            "answer": asking.question.answer,
            "predicted": max(loglikelihoods, key=lambda letter: loglikelihoods[letter]),
            "num_dropped_examples": len(asking.examples) - num_examples,
        },
    )


def open_task(run: "EvalRun", task: str) -> EvalTask:
    return MultipleChoice(run, task)


KIND = EvalKind(
    name="multiple_choice",
    is_chosen=lambda task: NAME.fullmatch(task) is not None,
    open=open_task,
    in_training=True,
)
