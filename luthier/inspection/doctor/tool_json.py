"""Tools and tool calls that are not valid JSON of their form."""

from collections.abc import Iterator

from luthier.core.errors import ToolFault
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "write tools as a JSON list and calls as JSON with name and arguments; until then the row is dropped"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if isinstance(sample.refusal, ToolFault):
        yield finding(sample, "tool_json", "error", str(sample.refusal), REMEDY)


CHECK = Check("tool_json", find)
