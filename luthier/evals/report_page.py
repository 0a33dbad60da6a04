"""The report of base against tuned as a self-contained HTML file, which works without a network.

`report_page.html` is the layout; every text of data and models is escaped here.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from luthier.evals.report import HEADS, NOTE, Example, Line, Report, texts_of

WIDTH = 120
"""Of the drawn interval, in pixels."""


def page(report: Report, facts: Mapping[str, str]) -> str:
    """The text of the file. `facts`: names and values for the line below the title."""
    methods = sorted({f"{line.metric}: {line.found.method}" for line in report.lines})
    return Template(Path(__file__).with_suffix(".html").read_text("utf-8")).substitute(
        title=escape(f"{report.tuned} against {report.base}"),
        base=escape(report.base),
        tuned=escape(report.tuned),
        facts=" · ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in facts.items()),
        heads="".join(f'<th scope="col">{escape(head)}</th>' for head in (*HEADS, "")),
        lines="\n".join(_row(line) for line in report.lines),
        note=escape(NOTE),
        notes="".join(f"<p>{escape(note)}</p>" for note in report.notes),
        methods="".join(f"<li>{escape(method)}</li>" for method in methods),
        examples=_examples(report.examples),
    )


def _row(line: Line) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in line.cells[:-1])
    style = line.verdict.replace(" ", "-")
    return f'<tr class="{style}">{cells}<td class="verdict">{line.verdict}</td><td>{_drawn(line)}</td></tr>'


def _drawn(line: Line) -> str:
    """The interval beside zero, as wide as the larger of its ends."""
    found = line.found
    if found.low is None or found.high is None:
        return ""
    reach = max(abs(found.low), abs(found.high), abs(found.difference)) or 1.0

    def x(value: float) -> str:
        return f"{WIDTH / 2 + value / reach * (WIDTH / 2 - 6):.1f}"

    label = escape(f"{line.cells[4]}, 95 % interval {line.cells[5]}")
    return (
        f'<svg width="{WIDTH}" height="16" role="img" aria-label="{label}">'
        f'<line class="zero" x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="16"/>'
        f'<line class="reach" x1="{x(found.low)}" x2="{x(found.high)}" y1="8" y2="8"/>'
        f'<circle cx="{x(found.difference)}" cy="8" r="4"/></svg>'
    )


def _examples(examples: Sequence[Example]) -> str:
    parts = []
    for (verdict, task, metric), own in groupby(examples, key=lambda one: (one.verdict, one.task, one.metric)):
        parts.append(f"<h2>{verdict.capitalize()} by {escape(metric)}: {escape(task)}</h2>")
        parts += [_example(example) for example in own]
    return "\n".join(parts)


def _example(example: Example) -> str:
    texts = "".join(
        f'<div class="part {name}"><b>{name}</b><pre>{escape(text) or "<i>nothing</i>"}</pre></div>'
        for name, text in texts_of(example)
    )
    return f'<section class="example {example.verdict}"><h3>{escape(example.place)}</h3>{texts}</section>'
