"""Answers without a word in them: they teach to say nothing.

Beside answers that are empty in the data, the model's own chat template may write nothing for one, such as a call of
tools that it has no words for.
"""

from collections.abc import Iterator, Sequence

from luthier.data.answers import without_thought
from luthier.data.doctor import Check, Finding, Sample, Terms, finding
from luthier.data.labels import IGNORE_INDEX, Encoded
from luthier.data.types import Example, Feedback, Message, Preference, Prompt

IN_DATA = "write the answer, or remove the row"
IN_TEMPLATE = "name a `template` that has words for it, or remove the row"


def find(sample: Sample, terms: Terms) -> Iterator[Finding]:
    if sample.example is None:
        return
    empty = [name for name, message in _answers(sample.example) if not without_thought(message.content).strip()]
    for name in empty:
        yield finding(sample, "empty_answers", "warning", f"{name} is empty", IN_DATA)
    if not empty and any(_learns_only_an_end(row, terms.special_ids) for row in sample.rows):
        what = "an answer is nothing but its end, although the data have words for it"
        yield finding(sample, "empty_answers", "warning", what, IN_TEMPLATE)


def _answers(example: Example) -> Sequence[tuple[str, Message]]:
    if isinstance(example, Prompt):
        return ()
    if isinstance(example, Preference):
        return (("the chosen answer", example.chosen), ("the rejected answer", example.rejected))
    answers = example.messages[1::2]
    if isinstance(example, Feedback) or len(answers) == 1:
        return (("the answer", answers[-1]),)
    return [(f"answer {number}", message) for number, message in enumerate(answers, start=1)]


def _learns_only_an_end(row: Encoded, special_ids: frozenset[int]) -> bool:
    """Whether a stretch of learned tokens begins with the special token that ends it."""
    before = IGNORE_INDEX
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label != IGNORE_INDEX and before == IGNORE_INDEX and label == token and token in special_ids:
            return True
        before = label
    return False


CHECK = Check("empty_answers", find)
