"""Rows without a target, most often because truncation removes the answers."""

from collections.abc import Iterator

from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if not context.has_targets or not sample.rows or any(all(part.has_target for part in row) for row in sample.rows):
        return
    parts = [part for row in sample.rows for part in row]
    if any(part.lost_labels for part in parts):
        if context.on_overlong != "truncate":
            return
        needed = max(part.num_tokens for part in parts)
        what = f"no learned token is left after truncation to cutoff_len {context.cutoff_len}"
        yield finding(
            sample, "no_label", "error", what, f"raise cutoff_len (it has {needed} tokens), or shorten the row"
        )
    else:
        yield finding(sample, "no_label", "error", "no token of it is learned", "give it an answer, or remove the row")


CHECK = Check("no_label", find)
