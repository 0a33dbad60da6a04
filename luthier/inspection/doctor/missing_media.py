"""Images, videos and audio files of a row that do not exist."""

from collections.abc import Iterator

from luthier.core.errors import MediaFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "put the file there, or set media_dir; until then the row is dropped"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if isinstance(sample.refusal, MediaFault):
        yield finding(sample, "missing_media", "error", str(sample.refusal), REMEDY)


CHECK = Check("missing_media", find)
