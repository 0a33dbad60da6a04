"""Rows that stand twice among the training rows, or twice among those for evaluation."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "remove all but one"
REMEDY_SPLIT = f"{REMEDY}; val_size may put one into training and another into evaluation"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    twin = sample.duplicates.get(sample.split)
    if twin is not None:
        remedy = REMEDY_SPLIT if context.splits_evaluation_off else REMEDY
        yield finding(sample, "exact_duplicates", "warning", f"the same as {twin.text}", remedy, twin)


CHECK = Check("exact_duplicates", find)
