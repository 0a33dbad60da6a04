"""`task: perplexity`: how well the model predicts the labeled tokens of the run's rows.

    loss = - sum_rows sum_t w_t log p(x_t | x_<t) / sum_rows sum_t w_t        perplexity = exp(loss)

The rows and the loss are those of training, so this is exp(eval_loss) of a training run on the same rows. Each token
counts the same, whatever row it is in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.data import has_rows
from luthier.config.rules.engine import Rule, Rules
from luthier.core.kinds import STAGES
from luthier.evals.task import EvalKind, EvalTask, Record
from luthier.stages.pt import perplexity_at

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.table import Table
    from luthier.evals.measure import Measure
    from luthier.evals.model import EvalModel
    from luthier.model.heads.output_head import OutputHead

NAME = "perplexity"


@dataclass(frozen=True, slots=True)
class RowQuestion:
    subject: str
    """The dataset, or empty for rows of several."""
    index: int
    rows: "Table"


class Perplexity:
    def __init__(self, run: "EvalRun") -> None:
        self.run = run
        self.questions_at_once = run.evaluation.batch_size
        self.hashes: dict[str, str] = {}
        self._head: OutputHead | None = None

    def questions(self, encoding: "Encoding") -> Sequence[RowQuestion]:
        from luthier.data.prepare import rows_digest
        from luthier.evals.rows import evaluated_rows

        tables = evaluated_rows(self.run, encoding).eval
        self.hashes = {f"rows {name}".strip(): rows_digest(rows) for name, rows in tables.items()}
        return [RowQuestion(name, index, rows) for name, rows in tables.items() for index in range(len(rows))]

    def score(self, model: "EvalModel", questions: Sequence[RowQuestion]) -> Sequence[Record]:
        import torch

        from luthier.data.collate import collate, model_inputs, pad_rows
        from luthier.infer.sampling import no_numbers
        from luthier.model.heads.output_head import inspect_head, token_logps

        if self._head is None:
            self._head = inspect_head(model.model)
        rows = [question.rows[question.index] for question in questions]
        pad_token_id = model.tokenizer.pad_token_id
        batch = collate(rows, lambda features: pad_rows(features, pad_token_id))
        batch = {name: value.to(model.model.device) for name, value in batch.items()}
        with torch.inference_mode():
            logps, _ = token_logps(model.model, self._head, model_inputs(batch), batch["positions"], batch["targets"])
        weights = batch.get("weights", torch.ones_like(logps))
        sums = torch.zeros(2, len(rows), dtype=torch.float64, device=logps.device)
        sums[0].index_add_(0, batch["target_rows"], (logps * weights).double())
        sums[1].index_add_(0, batch["target_rows"], weights.double())
        if bool(sums.isnan().any()):
            raise no_numbers()
        found = sums.T.tolist()
        return [
            Record(question.subject, question.index, {"loglikelihood": logp, "num_tokens": weight})
            for question, (logp, weight) in zip(questions, found, strict=True)
        ]

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        """Rows without labels say nothing."""
        from luthier.evals.measure import perplexity_of

        values = [record.values for record in records if record.values["num_tokens"]]
        losses = [-one["loglikelihood"] for one in values]
        return {NAME: perplexity_of(losses, [one["num_tokens"] for one in values])} if values else {}

    def example(self, question: RowQuestion, values: Mapping[str, Any]) -> None:
        """Every row has another loss, which says little of it."""

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        tokens = sum(record.values["num_tokens"] for record in records)
        measure = self.measures(records).get(NAME)
        return {
            "n": len(records),
            "num_tokens": tokens,
            "loss": math.log(measure.value) if measure else None,
            "perplexity": measure.value if measure else None,
            "standard_error": measure.standard_error if measure else None,
        }

    def results(self, records: Sequence[Record]) -> Any:
        """{dataset: {number of the row: its perplexity}}"""
        found: dict[str, dict[str, float]] = {}
        for record in records:
            tokens = record.values["num_tokens"]
            if tokens:
                perplexity = perplexity_at(-record.values["loglikelihood"] / tokens)
                found.setdefault(record.subject, {})[str(record.index)] = perplexity
        return found

    def table(self, records: Sequence[Record]) -> str:
        names = list(dict.fromkeys(record.subject for record in records))
        lines = [f"{'dataset':<24} {'rows':>7} {'tokens':>10} {'loss':>8} {'perplexity':>11} {'±':>8}"]
        for name in names if len(names) > 1 else []:
            lines.append(self._line(name, [record for record in records if record.subject == name]))
        lines.append(self._line(names[0] or "all rows" if len(names) == 1 else "all rows", records))
        return "\n".join(lines)

    def _line(self, name: str, records: Sequence[Record]) -> str:
        found = self.summary(records)
        numbers = [found[key] for key in ("loss", "perplexity", "standard_error")]
        loss, perplexity, error = ("" if number is None else f"{number:.4f}" for number in numbers)
        return f"{name:<24} {found['n']:>7,} {found['num_tokens']:>10,.0f} {loss:>8} {perplexity:>11} {error:>8}"


def open_task(run: "EvalRun", task: str) -> EvalTask:
    return Perplexity(run)


KIND = EvalKind(
    name=NAME,
    is_chosen=lambda task: task == NAME,
    open=open_task,
    reads_rows=True,
    in_training=True,
    check=Rules(
        (
            Rule(
                ("dataset", "eval_dataset", "task"),
                "is missing, and its rows are what perplexity is measured on",
                "give names from dataset_info.json in dataset or eval_dataset",
                lambda run: not has_rows(run) and not run.data.eval_dataset,
            ),
            Rule(
                ("stage", "task"),
                "has rows of several texts, and perplexity is that of one",
                "set stage: sft or stage: pt, with a dataset for it",
                lambda run: STAGES.get(run.stage).reads != "cross_entropy",
            ),
        )
    ),
)
