"""Rows that are dropped for a reason without a check of its own: a wrong type, a missing column, a truncated line."""

from collections.abc import Iterator

from luthier.core.errors import MediaFault, RoleFault, ToolFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

HAVE_OWN_CHECK = (RoleFault, ToolFault, MediaFault)


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.refusal is not None and not isinstance(sample.refusal, HAVE_OWN_CHECK):
        yield finding(sample, "unusable_rows", "error", str(sample.refusal), "fix the row; until then it is dropped")


CHECK = Check("unusable_rows", find)
