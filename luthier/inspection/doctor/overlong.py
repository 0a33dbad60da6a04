"""Rows longer than `cutoff_len`, and what `on_overlong` does with them."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, Severity, finding

REMEDY = "raise cutoff_len, shorten the row, or choose another on_overlong"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    cut = [part for row in sample.rows for part in row if part.lost_tokens]
    if not cut:
        return
    lost, labels = sum(part.lost_tokens for part in cut), sum(part.lost_labels for part in cut)
    length = max(part.num_tokens for part in cut)
    head = f"it has {length} tokens, cutoff_len is {context.cutoff_len}"
    severity: Severity = "warning" if labels else "info"
    if context.on_overlong == "error":
        severity, fate = "error", "the run stops here"
    elif context.on_overlong == "drop":
        severity, fate = "error", "the row is dropped"
    elif context.on_overlong == "split":
        severity, fate = "info", "it is cut into several rows"
    else:
        end = " and the end of an answer" if any(part.lost_terminator for part in cut) else ""
        end += " and text before the marks that open an answer" if any(part.shortened_prompts for part in cut) else ""
        fate = f"{lost} tokens are lost, {labels} of them learned{end}"
    yield finding(sample, "overlong", severity, f"{head}: {fate}", REMEDY)


CHECK = Check("overlong", find)
