"""Evaluation rows that are also training rows, exactly or nearly: they measure memorization."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "remove the row from the training data or from the evaluation data"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.split != "eval":
        return
    if "train" in sample.duplicates:
        other = sample.duplicates["train"]
        what = "it is trained on, too" if other == sample.place else f"trained on as {other.text}"
        yield finding(sample, "leakage", "error", what, REMEDY, other)
    elif "train" in sample.near:
        other, share = sample.near["train"]
        yield finding(
            sample, "leakage", "warning", f"about {share:.0%} the same as training row {other.text}", REMEDY, other
        )


CHECK = Check("leakage", find)
