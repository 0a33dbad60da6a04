"""Conversations in which the roles do not take turns, or that do not end where they should."""

from collections.abc import Iterator

from luthier.core.errors import RoleFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "let question and answer take turns, or correct `tags` in dataset_info.json; until then the row is left out"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if isinstance(sample.refusal, RoleFault):
        yield finding(sample, "role_order", "error", str(sample.refusal), REMEDY)


CHECK = Check("role_order", find)
