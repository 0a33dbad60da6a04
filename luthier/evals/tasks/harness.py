"""`task: harness/NAME[,NAME]`: tasks of lm-evaluation-harness, answered with luthier's scorer.

The harness makes the requests of a task and computes its metrics; the model answers them here, a group of documents at
a time, so that an evaluation that is killed goes on. A question is a document with all its requests. Tasks of one's own
are YAML files in task_dir. https://github.com/EleutherAI/lm-evaluation-harness
"""

import contextlib
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.core.registry import did_you_mean
from luthier.core.versions import require
from luthier.evals.task import EvalKind, EvalTask, Record

if TYPE_CHECKING:
    from luthier.config.runs import EvalRun
    from luthier.data.rows.encoding import Encoding
    from luthier.evals.measure import Goal, Measure
    from luthier.evals.model import EvalModel

PREFIX = "harness/"
GROUPS_TOGETHER = 16
"""Documents for each one of batch_size: texts of about the same length share a batch, so there must be some to choose
from."""
BOOTSTRAPS = 1000
"""Resamples for standard errors without a formula."""
_FAULTS = (OSError, ValueError, KeyError)
"""What the harness raises for a task that it cannot load."""
DEFAULT_SEED = 1234
"""Of the solved examples, as the harness has it."""


@dataclass(frozen=True, slots=True)
class Document:
    task: str
    number: int
    requests: tuple[Any, ...]
    """`lm_eval.api.instance.Instance`, in order."""


class Harness:
    def __init__(self, run: "EvalRun", task: str) -> None:
        keys = run.evaluation
        self.names = [name.strip() for name in task.removeprefix(PREFIX).split(",") if name.strip()]
        self.task_dir = Path(keys.task_dir)
        self.num_fewshot = keys.n_shot if "n_shot" in run.given else None
        self.seed = keys.seed if "seed" in run.given else DEFAULT_SEED
        self.limit = run.data.max_samples
        self.questions_at_once = GROUPS_TOGETHER * keys.batch_size
        self.hashes: dict[str, str] = {}
        self._loaded: Any = None
        self._model: Any = None
        self._evaluated: tuple[int, Any] | None = None

    def questions(self, encoding: "Encoding") -> Sequence[Document]:
        require("lm_eval", "harness", "`task: harness/...`")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._loaded = self._load()
        found = []
        digest = hashlib.sha256()
        for name, task in self._loaded["tasks"].items():
            documents: dict[int, list[Any]] = defaultdict(list)
            for request in self._requests(task):
                documents[request.doc_id].append(request)
                digest.update(repr((name, request.doc_id, request.idx, request.args)).encode())
            for number, requests in sorted(documents.items()):
                found.append(Document(name, number, tuple(sorted(requests, key=lambda request: request.idx))))
        self.hashes = {"requests": digest.hexdigest()}
        return found

    def _found(self) -> Any:
        """The tasks, as the harness loads them. To read the list of all its tasks takes it seconds, which tasks in
        task_dir do without unless they are made of others."""
        from lm_eval.tasks import TaskManager

        own = str(self.task_dir) if self.task_dir.is_dir() else None
        if own is not None:
            manager = TaskManager(include_path=own, include_defaults=False)
            with contextlib.suppress(*_FAULTS):
                if set(self.names) <= set(manager.all_tasks):
                    return manager.load(list(self.names))
        manager = TaskManager(include_path=own)
        for name in self.names:
            if name not in manager.all_tasks:
                hint = did_you_mean(name, manager.all_tasks) or "name a task of lm_eval, or a YAML file in task_dir"
                raise DataError(f"task: {PREFIX}{name}: lm_eval has no task of this name -> {hint}")
        try:
            return manager.load(list(self.names))
        except _FAULTS as fault:
            raise DataError(f"task: {PREFIX}{','.join(self.names)}: lm_eval cannot load it ({fault})") from fault

    def _load(self) -> Any:
        loaded = self._found()
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise DataError(f"task: {PREFIX}{name}: it runs programs that the model writes, or needs images")
            # As `lm_eval.simple_evaluate`: a task that says 0 itself stays without examples.
            default = task.get_config("num_fewshot")
            if self.num_fewshot is not None and default != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif default is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.seed)
        return loaded

    def _requests(self, task: Any) -> list[Any]:
        task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        requests: list[Any] = task.instances
        return requests

    def score(self, model: "EvalModel", questions: Sequence[Document]) -> Sequence[Record]:
        from luthier.evals.harness_models import ScoredModel

        if self._model is None:
            self._model = ScoredModel(model)
        by_kind: dict[str, list[Any]] = defaultdict(list)
        for document in questions:
            for request in document.requests:
                by_kind[request.request_type] += [request] * (request.repeats or 1)
        for kind, requests in by_kind.items():
            for request, answer in zip(requests, getattr(self._model, kind)(requests), strict=True):
                request.resps.append(answer)
        return [self._record(document) for document in questions]

    def _record(self, document: Document) -> Record:
        """`scores`: the metrics that are one number for a document, under the first filter of the task."""
        task = self._loaded["tasks"][document.task]
        answers = [list(request.resps) for request in document.requests]
        for one in task._filters:
            one.apply(list(document.requests))
        filters = document.requests[0].filtered_resps
        metrics = task.process_results(
            document.requests[0].doc, [request.filtered_resps[next(iter(filters))] for request in document.requests]
        )
        scores = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        return Record(document.task, document.number, {"answers": answers, "scores": scores})

    def measures(self, records: Sequence[Record]) -> "Mapping[str, Measure]":
        """The metrics that are means over documents, with the name of the task if there are several."""
        from luthier.evals.measure import mean_of

        found = {}
        for name, task in self._loaded["tasks"].items():
            own = [record.values["scores"] for record in records if record.subject == name]
            for metric in own[0] if own else ():
                if task.aggregation()[metric].__name__ == "mean":
                    goal: Goal = "higher" if task.higher_is_better()[metric] else "lower"
                    label = metric if len(self._loaded["tasks"]) == 1 else f"{name} {metric}"
                    found[label] = mean_of([scores[metric] for scores in own], goal=goal)
        return found

    def example(self, question: Document, values: Mapping[str, Any]) -> None:
        """What a document asks is known to its task alone."""

    def summary(self, records: Sequence[Record]) -> Mapping[str, Any]:
        found = self._evaluation(records)
        metrics = {name: _numbers(values) for name, values in found["results"].items()}
        return {"n": len(records), "metrics": metrics, "n_shot": dict(found["n-shot"])}

    def results(self, records: Sequence[Record]) -> Any:
        """What the harness itself reports."""
        found = self._evaluation(records)
        names = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")
        return json.loads(json.dumps({name: found[name] for name in names if name in found}, default=str))

    def table(self, records: Sequence[Record]) -> str:
        from lm_eval.utils import make_table

        found = self._evaluation(records)
        tables = [make_table(found)] + ([make_table(found, "groups")] if found.get("groups") else [])
        return "\n".join(str(table).rstrip() for table in tables)

    def _evaluation(self, records: Sequence[Record]) -> Any:
        """The metrics of the harness over these answers."""
        if self._evaluated is None or self._evaluated[0] != len(records):
            from lm_eval import evaluate

            from luthier.evals.harness_models import SavedAnswers

            answers = {
                (record.subject, record.index, number): values
                for record in records
                for number, values in enumerate(record.values["answers"])
            }
            found = evaluate(
                SavedAnswers(answers),
                self._loaded,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
            self._evaluated = len(records), found
        return self._evaluated[1]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`: the metrics and their standard errors, without the filter if there is no other."""
    found = {name: value for name, value in values.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in found.items()}


def open_task(run: "EvalRun", task: str) -> EvalTask:
    return Harness(run, task)


def _names_tasks(task: str) -> bool:
    return task.startswith(PREFIX) and bool(task.removeprefix(PREFIX).strip(" ,"))


KIND = EvalKind(name="harness", is_chosen=_names_tasks, open=open_task)
