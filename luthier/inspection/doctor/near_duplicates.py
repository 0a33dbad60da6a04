"""Near duplicates of another row of the same split."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "look at the two, and keep one if the other adds nothing"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.split in sample.near and sample.split not in sample.duplicates:
        other, share = sample.near[sample.split]
        what = f"about {share:.0%} the same as {other.text}"
        yield finding(sample, "near_duplicates", "info", what, REMEDY, other)


CHECK = Check("near_duplicates", find)
