"""Ranking rows with two equal answers: they express no preference."""

from collections.abc import Iterator

from luthier.data.types import Preference
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    match sample.example:
        case Preference(chosen=chosen, rejected=rejected) if chosen.content.strip() == rejected.content.strip():
            yield finding(sample, "equal_pairs", "warning", "chosen and rejected are equal", "remove the row")


CHECK = Check("equal_pairs", find)
