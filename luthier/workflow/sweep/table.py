"""The table of a sweep, the best run first: for the terminal, as Markdown, as JSON, and drawn.

The metric is `metric_for_best_model`, else eval_loss; where no run was evaluated it is train_loss.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.files import write_atomically
from luthier.core.log import info, warn
from luthier.core.versions import is_installed, missing_extra
from luthier.workflow.sweep.grid import GridRun
from luthier.workflow.sweep.one_run import State, error_of, state_of

NAME = "sweep"
"""Of the files: sweep.json, sweep.md, sweep.png."""
NO_EVALUATION = "No run was evaluated, so train_loss decides; set val_size or eval_dataset to compare on other rows."
TIMING = ("_runtime", "_per_second")
"""Endings of metrics that say how long an evaluation took."""
MAX_LINES = 12
"""Lines of a panel that a legend can still tell apart."""
LOG_SCALE_RATIO = 20
"""Largest over smallest value, from which on an axis of the plot is logarithmic."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the sweep."""

    name: str
    values: Mapping[str, str]
    folder: Path
    state: State
    metrics: Mapping[str, float]
    """All that is known of the saved weights; empty unless the run is done."""
    losses: Sequence[tuple[int, float]]
    """(step, loss) of each logged step."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    rows: Sequence[Row]
    """Those with a metric first, the best at the top; then those that are not done, in the order of the grid."""
    metric: str
    greater_is_better: bool
    notes: Sequence[str] = ()

    @property
    def num_done(self) -> int:
        return sum(row.state == "done" for row in self.rows)

    def remark(self, name: str) -> str:
        """Behind the name of a run that has ended: its metric, and whether it is the best so far."""
        places = [row.name for row in self.rows]
        row = self.rows[places.index(name)]
        if self.metric not in row.metrics:
            return ""
        best = ", the best so far" if places[0] == name and self.num_done > 1 else ""
        return f", {self.metric} {row.metrics[self.metric]:.6g}{best}"

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The heads, then one line for each run."""
        keys = list(self.rows[0].values)
        metrics = list(dict.fromkeys((self.metric, "train_loss", "train_runtime")))
        heads = {"train_runtime": "seconds"}
        lines = [("run", *keys, *(heads.get(name, name) for name in metrics), "state")]
        for number, row in enumerate(self.rows, start=1):
            shown = [_shown(row.metrics.get(name), name) for name in metrics]
            lines.append((str(number), *(row.values[key] for key in keys), *shown, row.state))
        return lines

    @property
    def remarks(self) -> list[str]:
        """The best run, what the reader must know, and the error of each run that failed."""
        best = self.rows[0]
        found = [f"best by {self.metric}: {best.folder}"] if self.metric in best.metrics else []
        return [*found, *self.notes, *(f"{row.name} failed: {row.error}" for row in self.rows if row.error)]

    def as_text(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in self.cells
        ]
        return "\n".join([*lines, "", *self.remarks])

    def as_markdown(self) -> str:
        heads, *lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in self.cells]
        table = [f"| {heads} |", "|" + "---|" * len(self.cells[0]), *(f"| {line} |" for line in lines)]
        return "\n".join([*table, *(f"\n{remark}" for remark in self.remarks)]) + "\n"

    def as_data(self) -> dict[str, Any]:
        runs = [
            {
                "name": row.name,
                "output_dir": str(row.folder),
                "values": dict(row.values),
                "state": row.state,
                "metrics": dict(row.metrics),
                **({"error": row.error} if row.error else {}),
            }
            for row in self.rows
        ]
        return {"metric": self.metric, "greater_is_better": self.greater_is_better, "notes": self.notes, "runs": runs}

    def save(self, folder: Path, *, plots: bool) -> None:
        """sweep.json and sweep.md; with `plots` also sweep.png, unless matplotlib is not installed."""
        write_atomically(folder / f"{NAME}.json", json.dumps(self.as_data(), indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / f"{NAME}.md", self.as_markdown())
        if plots and not is_installed("matplotlib"):
            warn(str(missing_extra("matplotlib", "plot", "the plot of a sweep")))
        elif plots:
            path = folder / f"{NAME}.png"
            draw(self, path)
            info(f"table: {folder / NAME}.md, plot: {path}")


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "train_runtime" else f"{value:.6g}"


def read_table(runs: Sequence[GridRun]) -> Table:
    """The table of all runs as their folders are now."""
    rows = [_row(one) for one in runs]
    training = runs[0].run.training
    metric = f"eval_{(training['metric_for_best_model'] or 'loss').removeprefix('eval_')}"
    greater, notes = training["greater_is_better"], []
    if not any(metric in row.metrics for row in rows) and any("train_loss" in row.metrics for row in rows):
        metric, greater, notes = "train_loss", None, [_why_train_loss(rows, metric)]
    if greater is None:  # the rule of transformers
        greater = not metric.endswith("loss")

    def place(row: Row) -> tuple[bool, float]:
        value = row.metrics.get(metric, math.nan)
        return math.isnan(value), 0 if math.isnan(value) else -value if greater else value

    return Table(sorted(rows, key=place), metric, greater, notes)


def _why_train_loss(rows: Sequence[Row], missing: str) -> str:
    names = {name for row in rows for name in row.metrics}
    evaluated = sorted(name for name in names if name.startswith("eval_") and not name.endswith(TIMING))
    if not evaluated:
        return NO_EVALUATION
    return f"No evaluation has {missing}, so train_loss decides; set metric_for_best_model: {' or '.join(evaluated)}."


def _row(one: GridRun) -> Row:
    state = state_of(one.folder)
    history = _history(one.folder)
    metrics = _metrics(one.folder, history) if state == "done" else {}
    losses = [(logs["step"], logs["loss"]) for logs in history if "loss" in logs and "step" in logs]
    return Row(
        one.name, one.values, one.folder, state, metrics, losses, error_of(one.folder) if state == "failed" else ""
    )


def _history(folder: Path) -> list[Mapping[str, Any]]:
    """What the run has logged; empty unless it has ended well."""
    state = _read_object(folder / "trainer_state.json")
    return list(state.get("log_history", []))


def _metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Those of the saved weights. Without an evaluation at the end, the last one is that of the last weights."""
    evaluations = [logs for logs in history if any(name.startswith("eval_") for name in logs)]
    found = {**(evaluations[-1] if evaluations else {}), **_read_object(folder / "all_results.json")}
    return {name: value for name, value in found.items() if isinstance(value, int | float) and name != "step"}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def draw(table: Table, path: Path) -> None:
    """Two panels: the metric over the key with the most values, and the loss of each run over its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_metric(left, table)
    for row in table.rows[:MAX_LINES]:
        if row.losses:
            right.plot(*zip(*row.losses, strict=True), label=_label(row.values))
    right.set(xlabel="step", ylabel="loss", title=f"loss of {'the best ' if len(table.rows) > MAX_LINES else ''}runs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _draw_metric(axes: Any, table: Table) -> None:
    """One line for each combination of the other keys; numbers stand in their order, anything else as it was given."""
    rows = [row for row in table.rows if table.metric in row.metrics]
    key = widest_key(table.rows)
    given = list(dict.fromkeys(row.values[key] for row in sorted(table.rows, key=lambda row: row.name)))
    numbers = {text: number for text in given if (number := _number(text)) is not None}
    is_number = len(numbers) == len(given)
    place = numbers if is_number else {text: float(index) for index, text in enumerate(given)}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        others = _label({name: value for name, value in row.values.items() if name != key})
        lines.setdefault(others, []).append((place[row.values[key]], row.metrics[table.metric]))
    for others, points in list(lines.items())[:MAX_LINES]:
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=others or None)
    if not is_number:
        axes.set_xticks(range(len(given)), given)
    elif min(numbers.values()) > 0 and max(numbers.values()) / min(numbers.values()) >= LOG_SCALE_RATIO:
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=table.metric, title=f"{table.metric} of {table.rows[0].folder.parent.name}")


def widest_key(rows: Sequence[Row]) -> str:
    """The key with the most values, the first of equals."""
    return max(rows[0].values, key=lambda key: len({row.values[key] for row in rows}))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _label(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
