"""Metrics of generated answers.

| name | compares |
|---|---|
| `exact` | the text, without spaces around it |
| `number` | the last number of the answer and of the reference |
| `f1` | the words that both have (the F1 of SQuAD, 1606.05250), as a bag; Chinese characters count as words |
| `accuracy`, `precision`, `recall`, `class_f1` | the answer as the name of a class; three are means over classes |
| `json` | `json_valid`: the answer is JSON; `json_equal`: it is the data of the reference |
| `tool_call` | `tool_call`: names and arguments of all calls; `tool_name`: the names alone |
| `bleu`, `rouge` | as `predict_with_generate`, in percent (`luthier.evals.text_metrics`) |

All other scores are between 0 and 1. The order of keys in JSON and in arguments does not matter, nor that of calls.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from luthier.data.types import ToolCall
from luthier.evals.measure import Floats, Measure, mean_of
from luthier.evals.numbers import equal_numbers, last_number
from luthier.evals.text_metrics import score_pair

CLASS_METRICS = ("precision", "recall", "class_f1")
"""Metrics of all questions together: one question has no precision."""
GRADED = ("f1", "bleu-4", "rouge-1", "rouge-2", "rouge-l")
"""Scores that are not only right or wrong."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_FENCED = re.compile(r"\s*```[a-zA-Z]*\n(.*?)\n?```\s*", re.DOTALL)
_AROUND_CLASS = " \t\n\r.,;:!?。，；：！？*_`\"'“”‘’「」()[]<>"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or the reference that it is compared with."""

    text: str
    """Without its thought and its calls."""
    calls: tuple[ToolCall, ...] = ()


class NotJson(ValueError):
    """A text that is no JSON."""


def scores_of(names: Sequence[str], answer: Reply, reference: Reply) -> dict[str, float]:
    """The scores of one question by the metrics of these names; none for those of `CLASS_METRICS`."""
    return {key: score for name in names if name in METRICS for key, score in METRICS[name](answer, reference).items()}


def measures(names: Sequence[str], scores: Sequence[Mapping[str, float]], classes: "Classes") -> dict[str, Measure]:
    """The metrics of all questions. `scores`: what `scores_of` gave for each."""
    found = {key: mean_of([score[key] for score in scores], has_grades=key in GRADED) for key in scores[0]}
    return found | {name: classes.measure(name) for name in CLASS_METRICS if name in names}


def fault_of(names: Sequence[str], reference: Reply) -> str | None:
    """Why a metric cannot compare anything with this reference, or None."""
    if "number" in names and last_number(reference.text) is None:
        return "has no number, which `number` compares"
    if "json" in names:
        try:
            read_json(reference.text)
        except NotJson as fault:
            return f"is no JSON, which `json` compares ({fault})"
    if {"accuracy", *CLASS_METRICS} & set(names) and not class_of(reference.text):
        return "is empty and names no class"
    return None


def exact(answer: Reply, reference: Reply) -> dict[str, float]:
    return {"exact": float(answer.text.strip() == reference.text.strip())}


def number(answer: Reply, reference: Reply) -> dict[str, float]:
    found, expected = last_number(answer.text), last_number(reference.text)
    return {"number": float(found is not None and expected is not None and equal_numbers(found, expected))}


def f1(answer: Reply, reference: Reply) -> dict[str, float]:
    """2 |common| / (|answer| + |reference|), 1 if both have no words."""
    said, wanted = Counter(words(answer.text)), Counter(words(reference.text))
    total = said.total() + wanted.total()
    return {"f1": 2 * (said & wanted).total() / total if total else 1.0}


def accuracy(answer: Reply, reference: Reply) -> dict[str, float]:
    return {"accuracy": float(class_of(answer.text) == class_of(reference.text))}


def json_metric(answer: Reply, reference: Reply) -> dict[str, float]:
    try:
        found = read_json(answer.text)
    except NotJson:
        return {"json_valid": 0.0, "json_equal": 0.0}
    return {"json_valid": 1.0, "json_equal": float(equal_data(found, read_json(reference.text)))}


def tool_call(answer: Reply, reference: Reply) -> dict[str, float]:
    """The calls of both in any order; a question without calls is right if none is made."""
    names = Counter(call.name for call in answer.calls) == Counter(call.name for call in reference.calls)
    return {"tool_call": float(_same_calls(answer.calls, reference.calls)), "tool_name": float(names)}


def bleu(answer: Reply, reference: Reply) -> dict[str, float]:
    return {"bleu-4": score_pair(answer.text, reference.text)["bleu-4"]}


def rouge(answer: Reply, reference: Reply) -> dict[str, float]:
    scores = score_pair(answer.text, reference.text)
    return {key: scores[key] for key in ("rouge-1", "rouge-2", "rouge-l")}


METRICS: Mapping[str, Callable[[Reply, Reply], dict[str, float]]] = {
    "exact": exact,
    "number": number,
    "f1": f1,
    "accuracy": accuracy,
    "json": json_metric,
    "tool_call": tool_call,
    "bleu": bleu,
    "rouge": rouge,
}
METRIC_NAMES = (*METRICS, *CLASS_METRICS)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def class_of(text: str) -> str:
    """The whole text as the name of a class: case, spaces and punctuation around it do not matter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(_AROUND_CLASS).split())


def read_json(text: str) -> Any:
    """The data of a text that is JSON as a whole, or inside one code fence. Raises `NotJson`."""
    fenced = _FENCED.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError) as fault:
        raise NotJson(str(fault)) from fault


def equal_data(one: Any, other: Any) -> bool:
    """Equality of JSON data: 1 is 1.0 but not true, objects have no order, lists do."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal_data(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal_data, one, other))
    return bool(one == other)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _same_calls(made: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> bool:
    left = list(wanted)
    for call in made:
        for index, candidate in enumerate(left):
            if call.name == candidate.name and equal_data(call.arguments, candidate.arguments):
                del left[index]
                break
        else:
            return False
    return not left


@dataclass(frozen=True, slots=True)
class Classes:
    """Answers and references as classes. The classes are those of the references; any other answer is a miss.

    Letters: C classes.
    """

    answers: Sequence[str]
    references: Sequence[str]

    @property
    def names(self) -> list[str]:
        return sorted({class_of(text) for text in self.references})

    def measure(self, name: str) -> Measure:
        """The mean of `precision`, `recall` or `class_f1` over the classes (macro average)."""
        right = np.asarray([class_of(a) == class_of(r) for a, r in zip(self.answers, self.references, strict=True)])
        return Measure(self._columns(), partial(_macro, _NUMERATORS_OVER[name]), right.astype(np.float64))

    def table(self) -> dict[str, dict[str, float]]:
        """Per class: precision, recall, class_f1, and how many references have it."""
        sums = self._columns().sum(axis=0)
        values = {name: _by_class(over, sums) for name, over in _NUMERATORS_OVER.items()}
        count = sums.reshape(3, -1)[2]
        return {
            label: {**{name: float(value[at]) for name, value in values.items()}, "n": int(count[at])}
            for at, label in enumerate(self.names)
        }

    def _columns(self) -> Floats:
        """(N, 3 C): for each class whether the question is hit, predicted, and true."""
        number_of = {name: number for number, name in enumerate(self.names)}
        numbers = np.arange(len(number_of))
        predicted = np.asarray([number_of.get(class_of(text), -1) for text in self.answers])[:, None] == numbers
        true = np.asarray([number_of[class_of(text)] for text in self.references])[:, None] == numbers
        return np.concatenate([predicted & true, predicted, true], axis=1).astype(np.float64)


_NUMERATORS_OVER: Mapping[str, tuple[float, float]] = {
    "precision": (1.0, 0.0),
    "recall": (0.0, 1.0),
    "class_f1": (0.5, 0.5),
}
"""hits / (a * predicted + b * true): the weights a and b."""


def _by_class(over: tuple[float, float], sums: Floats) -> Floats:
    """Sums (..., 3 C) -> (..., C); 0 for a class with no hits."""
    hits, predicted, true = np.split(sums, 3, axis=-1)
    below = over[0] * predicted + over[1] * true
    return hits / np.where(below > 0, below, 1.0)


def _macro(over: tuple[float, float], sums: Floats) -> Floats:
    return np.asarray(_by_class(over, sums).mean(axis=-1))
