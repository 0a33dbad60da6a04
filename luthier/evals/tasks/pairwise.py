"""`task: pairwise`: another model judges, in both orders, whether an answer is better than another one.

The answers are those of `task: generation`. The other ones are the answers of the dataset, or with `compare` those of
the other model. `luthier.evals.pairwise` says how verdicts are counted.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules, is_given, not_
from luthier.core.errors import InvalidInput
from luthier.evals.task import EvalKind, EvalTask, Record, Shown
from luthier.evals.tasks.generation import ROW_RULES, PromptQuestion, as_values, prompt_questions, shown_text

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.evals.measure import Measure
    from luthier.evals.model import EvalModel
    from luthier.evals.paired import PairedDifference
    from luthier.evals.pairwise import Judgement

NAME = "pairwise"
WIN_RATE = "win_rate"


class Pairwise:
    def __init__(self, run: "EvalRun") -> None:
        from luthier.evals.judge_client import JudgeClient

        keys = run.evaluation
        assert keys.judge_url is not None and keys.judge_model is not None, "a rule demands them"
        self.run = run
        self.client = JudgeClient(keys.judge_url, keys.judge_model)
        self.questions_at_once = keys.batch_size * 4
        self.hashes: dict[str, str] = {}
        self._others: dict[tuple[str, int], str] | None = None

    def questions(self, encoding: "Encoding") -> Sequence[PromptQuestion]:
        hashes, found = prompt_questions(self.run, encoding)
        self.hashes.update(hashes)
        return found

    def against(self, records: Sequence[Record]) -> None:
        """Compare with the answers in the records of another model instead of those of the dataset."""
        if any("answer" not in record.values for record in records):
            raise InvalidInput(
                "compare: those results hold no answers -> compare with results of generation or pairwise"
            )
        others = {(record.subject, record.index): shown_text("answer", record.values) for record in records}
        self.hashes["other answers"] = hashlib.sha256("\0".join(others.values()).encode()).hexdigest()
        self._others = others

    def score(self, model: "EvalModel", questions: Sequence[PromptQuestion]) -> Sequence[Record]:
        from luthier.evals.pairwise import Pair, judge_all

        values = []
        for question, text in zip(questions, model.answers([one.prompt for one in questions]), strict=True):
            answer = as_values("answer", model.read(text, question.prompt, with_calls=False))
            values.append({"prompt": question.text, **answer, "other": self._other(model, question)})
        pairs = [Pair(one["prompt"], shown_text("answer", one), one["other"]) for one in values]
        return [
            Record(
                question.subject,
                question.index,
                {
                    **one,
                    "ours_first": judgement.ours_first,
                    "theirs_first": judgement.theirs_first,
                    "asked": judgement.asked,
                    "outcome": judgement.outcome,
                },
            )
            for question, one, judgement in zip(questions, values, judge_all(self.client, pairs), strict=True)
        ]

    def _other(self, model: "EvalModel", question: PromptQuestion) -> str:
        if self._others is not None:
            try:
                return self._others[question.subject, question.index]
            except KeyError:
                raise InvalidInput(
                    f"compare: those results lack row {question.index} -> evaluate both on the same rows"
                ) from None
        return model.read(model.reference(question.reference), question.prompt, with_calls=False).words.strip()

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        from luthier.evals.measure import mean_of
        from luthier.evals.pairwise import SCORE

        return {WIN_RATE: mean_of([SCORE[record.values["outcome"]] for record in records], has_grades=True)}

    def judged(self, records: Sequence[Record]) -> "PairedDifference":
        """Win rate of the other answers, ours, and their difference: (wins - losses) / pairs."""
        from luthier.evals.paired import PairedDifference, score_interval, sign_test

        found = self.summary(records)
        low, high = score_interval(found["wins"], found["losses"], found["n"])
        return PairedDifference(
            base=1 - found[WIN_RATE],
            tuned=found[WIN_RATE],
            difference=2 * found[WIN_RATE] - 1,
            low=low,
            high=high,
            num_questions=found["n"],
            num_better=found["wins"],
            num_worse=found["losses"],
            p=sign_test(found["wins"], found["losses"]),
            method=f"Tango's score interval of wins and losses, as {self.run.evaluation.judge_model} judges",
        )

    def example(self, question: PromptQuestion, values: Mapping[str, Any]) -> Shown:
        return Shown(question.text, "", shown_text("answer", values))

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        from luthier.evals.pairwise import summary_of

        lengths = [(len(shown_text("answer", record.values)), len(record.values["other"])) for record in records]
        judgements = [_judgement(record.values) for record in records]
        found = summary_of([(judged, *own) for judged, own in zip(judgements, lengths, strict=True)])
        error = self.measures(records)[WIN_RATE].standard_error
        return {**found, "standard_error": error, "judge": self.run.evaluation.judge_model}

    def results(self, records: Sequence[Record]) -> Any:
        """{dataset: {number of the row: outcome}}"""
        found: dict[str, dict[str, str]] = {}
        for record in records:
            found.setdefault(record.subject, {})[str(record.index)] = record.values["outcome"]
        return found

    def table(self, records: Sequence[Record]) -> str:
        found = self.summary(records)
        low, high = found["win_rate_interval"]
        lines = [
            f"win rate      {found[WIN_RATE]:.4f}, 95 % interval {low:.4f} to {high:.4f} ({found['n']:,} pairs)",
            f"outcomes      {found['wins']:,} wins, {found['losses']:,} losses, {found['ties']:,} ties",
            f"consistency   {_percent(found['consistency'])} of the pairs got the same verdict in both orders",
            f"first shown   preferred in {_percent(found['first_share'])} of the verdicts",
            f"length        {found['mean_length']:.0f} characters against {found['mean_length_other']:.0f}; the longer"
            f" one won {_percent(found['longer_wins'])} of the decided pairs",
        ]
        if found["unreadable_verdicts"]:
            lines.append(f"unreadable    {found['unreadable_verdicts']:,} verdicts, which count as ties")
        return "\n".join(lines)


def _judgement(values: Mapping[str, Any]) -> "Judgement":
    from luthier.evals.pairwise import Judgement

    return Judgement(values["ours_first"], values["theirs_first"], values["asked"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def open_task(run: "EvalRun", task: str) -> EvalTask:
    return Pairwise(run)


KIND = EvalKind(
    name=NAME,
    is_chosen=lambda task: task == NAME,
    open=open_task,
    reads_rows=True,
    judges=True,
    check=Rules(
        (
            *ROW_RULES,
            Rule(
                ("judge_url", "task"),
                "is missing, and the model there judges the answers",
                "give the address of an OpenAI-style API, e.g. http://127.0.0.1:8000/v1",
                not_(is_given("evaluation", "judge_url")),
            ),
            Rule(
                ("judge_model", "task"),
                "is missing",
                "name the model at judge_url that judges",
                not_(is_given("evaluation", "judge_model")),
            ),
        )
    ),
)
