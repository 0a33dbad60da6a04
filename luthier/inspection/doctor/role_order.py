"""Conversations whose roles do not alternate, or that end with the wrong role."""

from collections.abc import Iterator

from luthier.core.errors import RoleFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "make questions and answers alternate, or correct `tags` in dataset_info.json; until then the row is dropped"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if isinstance(sample.refusal, RoleFault):
        yield finding(sample, "role_order", "error", str(sample.refusal), REMEDY)


CHECK = Check("role_order", find)
