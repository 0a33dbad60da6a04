"""Rows that are left out for a reason that has no check of its own: a wrong type, a missing column, half a line, ..."""

from collections.abc import Iterator

from luthier.core.errors import MediaFault, RoleFault, ToolFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

TOLD_ELSEWHERE = (RoleFault, ToolFault, MediaFault)


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.refusal is not None and not isinstance(sample.refusal, TOLD_ELSEWHERE):
        yield finding(sample, "unusable_rows", "error", str(sample.refusal), "mend the row; until then it is left out")


CHECK = Check("unusable_rows", find)
