"""Tokenized rows and their account as a self-contained HTML file, which works without a network.

`page.html` is the layout; all text of the data is escaped here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from luthier.data.media.kinds import media_kinds
from luthier.inspection.images import Shown as ShownImage
from luthier.inspection.segments import RoleMarks, Shown, shown_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.ledger import Ledger

MAX_TIP_CHARS = 60
"""Maximum length of the text of a token in its tooltip."""

_ACCOUNT_HEADS = (
    "dataset",
    "rows",
    "kept",
    "dropped",
    "truncated",
    "tokens",
    "learned",
    "lost tokens",
    "lost learned",
    "lost ends",
    "thoughts left out",
    "shortened prompts",
)
_MEDIA_HEADS = ("{}s", "{} tokens", "{}s left out")
"""Of each kind of media that there is."""


@dataclass(frozen=True, slots=True)
class PageRow:
    name: str
    """The split or the dataset, shown before the row number."""
    number: int
    input_ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] = ()
    """Empty if the weight of every target is 1."""
    images: Sequence[ShownImage] = ()


def page(
    title: str,
    facts: Mapping[str, str],
    rows: Iterable[PageRow],
    ledger: "Ledger",
    tokenizer: "PreTrainedTokenizerBase",
    marks: RoleMarks,
) -> str:
    """The text of the file. `facts`: names and values for the line below the title."""
    listed = list(rows)
    anchors = [f"row-{order}" for order in range(len(listed))]
    return Template(Path(__file__).with_suffix(".html").read_text("utf-8")).substitute(
        title=escape(title),
        facts=" · ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in facts.items()),
        choices="".join(
            f'<option value="{anchor}">{escape(row.name)} {row.number}</option>'
            for anchor, row in zip(anchors, listed, strict=True)
        ),
        rows="\n".join(_row(row, anchor, tokenizer, marks) for anchor, row in zip(anchors, listed, strict=True)),
        ledger=_ledger(ledger),
    )


def _row(row: PageRow, anchor: str, tokenizer: "PreTrainedTokenizerBase", marks: RoleMarks) -> str:
    tokens = shown_tokens(row.input_ids, row.labels, tokenizer, marks, row.weights, row.images)
    learned = sum(len(token.ids) for token in tokens if token.is_learned)
    parts = "".join(
        f'<div class="part">{f"<b>{role}</b>" if role else ""}<pre>{"".join(map(_token, own))}</pre></div>'
        for role, own in groupby(tokens, key=lambda token: token.role)
    )
    head = f'<a href="#{anchor}">{escape(row.name)} row {row.number}</a>'
    counts = f"<span>{len(row.input_ids)} tokens</span><span>{learned} learned</span>"
    return f'<section class="row" id="{anchor}"><h3>{head}{counts}</h3>{parts}</section>'


def _token(token: Shown) -> str:
    ends_line = token.is_learned and "\n" in token.text
    partly = token.is_learned and token.weight != 1
    flags = {"l": token.is_learned, "w": partly, "m": token.is_mark, "s": token.is_special, "n": ends_line}
    names = " ".join(name for name, is_on in flags.items() if is_on)
    tip = escape(f"{' '.join(map(str, token.ids))} {_visible(token.text)}{f' weight {token.weight:g}' * partly}")
    return f'<i{f" class={chr(34)}{names}{chr(34)}" if names else ""} data-t="{tip}">{escape(token.text)}</i>'


def _visible(text: str) -> str:
    """The text of a token in one line, in quotes so that spaces are visible."""
    cut = text if len(text) <= MAX_TIP_CHARS else text[:MAX_TIP_CHARS] + "…"
    return "“" + cut.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + "”"


def _ledger(ledger: "Ledger") -> str:
    kinds = [k for k in media_kinds() if any(any(account.of_kind(k)) for account in ledger.accounts.values())]
    accounts = [
        (
            name,
            account.rows_in,
            account.kept,
            account.num_dropped,
            account.truncated,
            account.tokens,
            account.labeled_tokens,
            account.lost_tokens,
            account.lost_labeled_tokens,
            account.lost_terminators,
            account.thoughts_left_out,
            account.shortened_prompts,
            *(number for kind in kinds for number in account.of_kind(kind)),
        )
        for name, account in ledger.accounts.items()
    ]
    reasons = [
        (name, count, reason, "; ".join(account.dropped_rows[reason]))
        for name, account in ledger.accounts.items()
        for reason, count in account.dropped.items()
    ]
    text = _table((*_ACCOUNT_HEADS, *(head.format(kind.name) for kind in kinds for head in _MEDIA_HEADS)), accounts, "")
    if reasons:
        text += "<h2>Dropped rows</h2>" + _table(("dataset", "rows", "reason", "the first of them"), reasons, "reasons")
    return text


def _table(heads: Sequence[str], lines: Iterable[Sequence[object]], name: str) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table class="{name}"><tr>{head}</tr>{body}</table></div>'


def _cell(value: object) -> str:
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else escape(str(value))
