"""Pictures, films and sounds that a row names and that are not there."""

from collections.abc import Iterator

from luthier.core.errors import MediaFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "put the file there, or set media_dir; until then the row is left out"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if isinstance(sample.refusal, MediaFault):
        yield finding(sample, "missing_media", "error", str(sample.refusal), REMEDY)


CHECK = Check("missing_media", find)
