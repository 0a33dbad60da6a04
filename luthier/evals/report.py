"""Base against tuned on the same questions: the table for a decision, with examples of what changed.

`luthier.evals.report_page` writes the same as a page.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.evals.measure import Goal
from luthier.evals.paired import PairedDifference

Verdict = Literal["better", "worse", "not clear"]
HEADS = ("task", "metric", "base", "tuned", "difference", "95 % interval", "p", "better", "worse", "of", "verdict")
NOTE = (
    "difference: tuned - base, paired by question. better, worse: questions that flipped each way. p: McNemar's exact"
    " test, for scores of 0 and 1."
)
MAX_TEXT_CHARS = 400
"""Length of a text of an example in the terminal. The page has all of it."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Line:
    """A metric of both models."""

    task: str
    metric: str
    goal: Goal
    found: PairedDifference

    @property
    def verdict(self) -> Verdict:
        if not self.found.is_clear:
            return "not clear"
        return "better" if (self.found.difference > 0) == (self.goal == "higher") else "worse"

    @property
    def cells(self) -> tuple[str, ...]:
        found, digits = self.found, decimals(max(abs(self.found.base), abs(self.found.tuned)))
        ends = [f"{end:+,.{digits}f}" for end in (found.low, found.high) if end is not None]
        return (
            self.task,
            self.metric,
            f"{found.base:,.{digits}f}",
            f"{found.tuned:,.{digits}f}",
            f"{found.difference:+,.{digits}f}",
            " to ".join(ends) or "-",
            "" if found.p is None else ("<0.0001" if found.p < 1e-4 else f"{found.p:.4f}"),
            f"{found.num_better:,}",
            f"{found.num_worse:,}",
            f"{found.num_questions:,}",
            self.verdict,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A question that flipped."""

    task: str
    metric: str
    verdict: Literal["better", "worse"]
    place: str
    """Which question it is."""
    question: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True, slots=True)
class Report:
    base: str
    """What the base is: the name of a model or a folder of results."""
    tuned: str
    lines: Sequence[Line]
    examples: Sequence[Example]
    notes: Sequence[str] = ()
    """What the reader must know, a sentence each."""


def as_text(report: Report) -> str:
    rows = [HEADS, *(line.cells for line in report.lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    left = {0, 1, len(HEADS) - 1}
    table = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    parts = [f"base   {report.base}", f"tuned  {report.tuned}", "", *table, "", NOTE, *report.notes]
    for example in report.examples:
        parts += ["", f"{example.verdict} by {example.metric}: {example.task} {example.place}".rstrip()]
        for name, text in texts_of(example):
            parts.append(f"  {name + ':':<10} {_one_line(text)}")
    return "\n".join(parts)


def texts_of(example: Example) -> list[tuple[str, str]]:
    """Name and text of what an example shows."""
    texts = [("question", example.question), ("reference", example.reference)]
    return [(name, text) for name, text in texts if text] + [("base", example.base), ("tuned", example.tuned)]


def decimals(size: float) -> int:
    """How many a number of this size is written with, and all numbers beside it."""
    return 4 if size < 10 else 2 if size < 1000 else 0


def _one_line(text: str) -> str:
    """A text of a model in one line, cut, without characters that steer a terminal."""
    shown = textwrap.shorten(text, MAX_TEXT_CHARS, placeholder=" …") if len(text) > MAX_TEXT_CHARS else text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", shown.replace("\n", "⏎ "))
