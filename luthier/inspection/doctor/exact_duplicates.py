"""Duplicate rows within the training data, or within the evaluation data."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "remove all but one"
REMEDY_SPLIT = f"{REMEDY}; val_size may put one into training and another into evaluation"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    other = sample.duplicates.get(sample.split)
    if other is not None:
        remedy = REMEDY_SPLIT if context.splits_evaluation_off else REMEDY
        yield finding(sample, "exact_duplicates", "warning", f"the same as {other.text}", remedy, other)


CHECK = Check("exact_duplicates", find)
