"""Empty answers, or answers with a thought only: they teach to say nothing."""

from collections.abc import Iterator, Sequence

from luthier.data.chat.answers import without_thought
from luthier.data.types import Example, Feedback, Message, Preference, Prompt
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "write the answer, or remove the row"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.example is None or not context.has_targets:
        return
    for name, message in _answers(sample.example):
        if not message.calls and not without_thought(message.content).strip():
            yield finding(sample, "empty_answers", "warning", f"{name} is empty", REMEDY)


def _answers(example: Example) -> Sequence[tuple[str, Message]]:
    if isinstance(example, Prompt):
        return ()
    if isinstance(example, Preference):
        return (("the chosen answer", example.chosen), ("the rejected answer", example.rejected))
    answers = example.messages[1::2]
    if isinstance(example, Feedback) or len(answers) == 1:
        return (("the answer", answers[-1]),)
    return [(f"answer {number}", message) for number, message in enumerate(answers, start=1)]


CHECK = Check("empty_answers", find)
