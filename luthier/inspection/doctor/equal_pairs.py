"""Ranking rows with two equal answers: they express no preference."""

from collections.abc import Iterator

from luthier.data.chat.answers import flat_text
from luthier.data.types import Message, Preference
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    match sample.example:
        case Preference(chosen=chosen, rejected=rejected) if _text(chosen) == _text(rejected):
            yield finding(sample, "equal_pairs", "warning", "chosen and rejected are equal", "remove the row")


def _text(answer: Message) -> str:
    return flat_text(answer, with_thought=True).strip()


CHECK = Check("equal_pairs", find)
