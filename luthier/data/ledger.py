"""The accounts of all datasets of a run. Saved as data_report.json, by a run that does not train as
eval_data_report.json."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.core.errors import DataError
from luthier.data.media.kinds import media_kinds
from luthier.data.rows.account import DatasetAccount

LEDGER_FILE = "data_report.json"
EVAL_LEDGER_FILE = "eval_data_report.json"
"""Of a run that does not train: it may evaluate in the folder of a training, whose report stays."""
MAX_SHOWN_ROWS = 3
"""Rows named per reason in the terminal."""
MAX_SHOWN_REASONS = 10
"""Reasons per dataset in the terminal; the report has all."""


@dataclass(slots=True)
class Ledger:
    """The accounts of all datasets of a run, and the number of training samples."""

    accounts: dict[str, DatasetAccount] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    """Split -> number of rows for the trainer, after mixing and packing."""
    leftover_tokens: int = 0
    """Tokens at the end of the last block of a pt run, too few to fill it."""
    is_streamed: bool = False
    """Whether rows were counted each time training drew them, up to the last step."""

    def account(self, dataset: str) -> DatasetAccount:
        return self.accounts.setdefault(dataset, DatasetAccount())

    @property
    def rows_in(self) -> int:
        return sum(account.rows_in for account in self.accounts.values())

    def add(self, other: "Ledger") -> None:
        """Add the counts of another ledger."""
        for name, account in other.accounts.items():
            self.account(name).add(account)
        for split, count in other.samples.items():
            self.samples[split] = self.samples.get(split, 0) + count
        self.leftover_tokens += other.leftover_tokens
        self.is_streamed |= other.is_streamed

    def taken(self) -> "Ledger":
        """The counts so far; this ledger is reset."""
        accounts = {name: account.taken() for name, account in self.accounts.items() if account.rows_in}
        found = Ledger(accounts, self.samples, self.leftover_tokens, self.is_streamed)
        self.samples, self.leftover_tokens = {}, 0
        return found

    def reasons(self) -> list[str]:
        """One line per dataset and kind of reason for dropping rows, with the first of these rows."""
        lines = []
        for name, account in self.accounts.items():
            by_count = sorted(account.dropped.items(), key=lambda item: -item[1])
            for reason, count in by_count[:MAX_SHOWN_REASONS]:
                rows = account.dropped_rows[reason][:MAX_SHOWN_ROWS]
                more = f" and {count - len(rows)} more" if count > len(rows) else ""
                lines.append(f"{name}: {count} dropped: {reason} ({'; '.join(rows)}{more})")
            if rest := by_count[MAX_SHOWN_REASONS:]:
                lines.append(f"{name}: {sum(count for _, count in rest)} dropped for {len(rest)} other reasons")
        return lines

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Wraps a later step: its `DataError` also tells which rows were dropped before, which may be its cause."""
        try:
            yield
        except DataError as error:
            reasons = self.reasons()
            if not reasons:
                raise
            raise DataError("\n  ".join([str(error), *reasons])) from error

    def summary(self) -> list[str]:
        """Lines to print before training starts."""
        lines = []
        for name, account in self.accounts.items():
            drawn = " drawn so far" if self.is_streamed else ""
            line = f"data {name}: {account.rows_in} rows{drawn} = {account.kept} kept + {account.num_dropped} dropped"
            line += f"; {account.tokens} tokens, {account.labeled_tokens} of them learned"
            for kind in media_kinds():
                count, num_tokens, left_out = account.of_kind(kind)
                if count or left_out:
                    line += f"; {kind.named(count)} of {num_tokens} tokens"
                if left_out:
                    line += f", and {left_out} left out by cutoff_len"
            if account.media_cut:
                line += f"; {account.media_cut} longer than the model hears, of which the beginning is learned"
            if account.truncated:
                line += (
                    f"; {account.truncated} rows truncated (lost {account.lost_tokens} tokens,"
                    f" {account.lost_labeled_tokens} of them learned, {account.lost_terminators} terminators"
                    f"{_shortened(account.shortened_prompts)})"
                )
            if account.rewritten:
                line += (
                    f"; {account.rewritten} conversations became {account.rewritten_into} rows"
                    f" ({account.rewritten_tokens} tokens, {account.rewritten_labeled_tokens} of them learned), since"
                    " the model's own chat template writes earlier answers in another way than the last one"
                    " (mask_history: true learns the last one alone, in one row)"
                )
            if account.thoughts_left_out:
                thoughts = "thought" if account.thoughts_left_out == 1 else "thoughts"
                line += f"; {account.thoughts_left_out} {thoughts} left out, since enable_thinking is false"
            if account.empty_thoughts:
                line += (
                    f"; answers without a thought that learn an empty one: {account.empty_thoughts}"
                    " (enable_thinking: null has it in the prompt)"
                )
            if account.split_into:
                line += f"; overlong rows cut into {account.split_into}"
            lines.append(line)
        if self.leftover_tokens:
            why = "not yet in a block" if self.is_streamed else "too few to fill a last block"
            lines.append(f"data: {self.leftover_tokens} tokens left over, {why}")
        return lines + self.reasons()

    def to_json(self) -> dict[str, Any]:
        accounts = {name: asdict(account) for name, account in self.accounts.items()}
        return {
            "datasets": accounts,
            "samples": self.samples,
            "leftover_tokens": self.leftover_tokens,
            "is_streamed": self.is_streamed,
        }


def _shortened(num_prompts: int) -> str:
    """What the summary adds about prompts that were cut."""
    return f"; {num_prompts} prompts lost text before the marks that open the answer" if num_prompts else ""


def ledger_of(saved: Mapping[str, Any]) -> Ledger:
    """The ledger that `Ledger.to_json` wrote."""
    accounts = {name: DatasetAccount(**account) for name, account in saved["datasets"].items()}
    return Ledger(accounts, dict(saved["samples"]), saved["leftover_tokens"], saved.get("is_streamed", False))
