"""`luthier data RUN --doctor`: problems in the datasets of a run, and the lengths of rows.

Only the tokenizer is loaded. All findings are counted; the terminal lists a few of each kind.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import STAGES
from luthier.inspection.doctor import Finding
from luthier.inspection.examination import Examination
from luthier.inspection.lengths import bars, measured
from luthier.workflow.text import load_text_side

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

LISTED_PER_KIND = 5
_SEVERITIES = ("error", "warning", "info")


def examine(run: "TrainRun", *, as_json: bool, limit: int | None, strict: bool) -> int:
    """Exit status 0; with `strict` 1 if there is an error or a warning.

    `limit`: findings to list of each kind, 0 for all; by default a few in text and all in JSON.
    """
    stage = STAGES.get(run.stage)
    text = load_text_side(run, reads_chat=stage.rows.reads_chat, for_model=False)
    default = 0 if as_json else LISTED_PER_KIND
    examination, tally = Examination(), _Tally(default if limit is None else limit)
    for finding in examination.findings(run, stage, text.encoding):
        is_listed = tally.add(finding)
        if as_json and is_listed:
            print(json.dumps(finding.to_json(), ensure_ascii=False))
    lengths = examination.lengths["train"] or examination.lengths["eval"]
    measures = measured(lengths, run.data.cutoff_len) if lengths else None
    if as_json:
        print(json.dumps({"summary": _summary(examination, tally, measures)}, ensure_ascii=False))
    else:
        print("\n".join(_report(examination, tally, measures)))
    for name, reason in examination.not_checked.items():
        print(f"luthier: {name} not checked: {reason}", file=sys.stderr)
    return 1 if strict and any(severity != "info" for _, severity in tally.counts) else 0


@dataclass(slots=True)
class _Tally:
    """Counts all findings and keeps the first of each kind."""

    limit: int
    """0 for all."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(check, severity) -> findings."""
    kinds: dict[tuple[str, str, str], list[Finding]] = field(default_factory=dict)
    """(severity, check, remedy) -> the findings that are listed."""
    num_of_kind: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, finding: Finding) -> bool:
        """Whether the finding is listed."""
        kind = (finding.severity, finding.check, finding.remedy)
        self.counts[finding.check, finding.severity] += 1
        self.num_of_kind[kind] += 1
        is_listed = not self.limit or self.num_of_kind[kind] <= self.limit
        if is_listed:
            self.kinds.setdefault(kind, []).append(finding)
        return is_listed

    def severities(self) -> dict[str, int]:
        return {name: sum(n for (_, severity), n in self.counts.items() if severity == name) for name in _SEVERITIES}


def _summary(examination: Examination, tally: _Tally, measures: dict[str, Any] | None) -> dict[str, Any]:
    checks = Counter[str]()
    for (check, _), count in tally.counts.items():
        checks[check] += count
    return {
        "rows": examination.num_rows,
        "findings": checks,
        "severities": tally.severities(),
        "lengths": measures,
        "not_checked": examination.not_checked,
    }


def _report(examination: Examination, tally: _Tally, measures: dict[str, Any] | None) -> Iterator[str]:
    rows = [f"{name} ({split}) {n}" for split, names in examination.num_rows.items() for name, n in names.items()]
    yield f"rows examined: {', '.join(rows) or 'none'}"
    for severity in _SEVERITIES:
        for kind, listed in tally.kinds.items():
            if kind[0] != severity:
                continue
            total = tally.num_of_kind[kind]
            yield f"\n{severity}: {kind[1]}, {total} finding{'s' * (total != 1)}"
            for finding in listed:
                yield f"  {finding.place.text if finding.place else finding.dataset}: {finding.what}"
            if total > len(listed):
                yield f"  and {total - len(listed)} more"
            yield f"  -> {kind[2]}"
    if measures:
        yield ""
        yield from bars(measures)
    counts = Counter[str]()
    for (_, severity), count in tally.counts.items():
        counts[severity] += count
    words = ", ".join(
        f"{counts[severity]} {severity}{'s' * (counts[severity] != 1)}" for severity in ("error", "warning")
    )
    yield f"\n{words}, {counts['info']} to know" if counts else "\nnothing found"
