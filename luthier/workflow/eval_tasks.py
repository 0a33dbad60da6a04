"""`eval_tasks`: tasks of `luthier eval` that are measured at each evaluation of a training run.

The questions are read before weights are loaded. Each process asks all of them, so all have the same numbers. The
training that follows is the same as without them: random state and mode of the model are restored.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from luthier.config.keys.evaluate import EvalConfig
from luthier.config.rules.eval_command import kind_of
from luthier.config.runs import EvalRun, TrainRun
from luthier.core.kinds import EVAL_KINDS
from luthier.evals.task import EvalTask, Record
from luthier.workflow.evaluate import as_eval_model

if TYPE_CHECKING:
    from torch import nn

    from luthier.data.prepare import PreparedData
    from luthier.evals.model import EvalModel
    from luthier.training.parts import Follow, TaskMetrics
    from luthier.workflow.text import TextSide


def task_metrics(run: TrainRun, text: "TextSide", data: "PreparedData") -> "TaskMetrics | None":
    """What the trainer calls after an evaluation; None without `eval_tasks`. Raises `InvalidInput` for questions that
    cannot be used."""
    names = run.tasks.eval_tasks
    if not names:
        return None
    as_eval = eval_run(run)
    opened: list[tuple[str, EvalTask, Sequence[Any]]] = []
    for name in names:
        kind = kind_of(name)
        assert kind is not None, "a rule demands it"
        task = EVAL_KINDS.get(kind).open(as_eval, name)
        opened.append((name, task, task.questions(text.encoding)))
    last = list(data.eval)[-1] if data.eval else ""
    last_prefix = f"eval_{last}" if last else "eval"

    def measure(model: "nn.Module", prefix: str, follow: "Follow") -> Mapping[str, float]:
        if prefix != last_prefix:  # once for all evaluation sets
            return {}
        with at_rest(model):
            asked = as_eval_model(as_eval, model, text)  # type: ignore[arg-type]
            return {name: value for one in opened for name, value in metrics_of(asked, *one, follow)}

    return measure


def metrics_of(
    model: "EvalModel", name: str, task: EvalTask, questions: Sequence[Any], follow: "Follow"
) -> Iterator[tuple[str, float]]:
    """`eval_<task>_<metric>` and its value."""
    size = task.questions_at_once
    records: list[Record] = []
    starts = range(0, len(questions), size)
    part_is_done = follow(starts)
    for start in starts:
        records += task.score(model, questions[start : start + size])
        part_is_done()
    for metric, measure in task.measures(records).items():
        yield f"eval_{name}_{metric}", measure.value


def eval_run(run: TrainRun) -> EvalRun:
    """The same run as one of `luthier eval`."""
    keys = run.tasks
    evaluation = EvalConfig(
        task=keys.eval_tasks or (),
        task_dir=keys.task_dir,
        lang=keys.lang,
        n_shot=keys.n_shot,
        metrics=keys.metrics,
        batch_size=run.training["per_device_eval_batch_size"],
        seed=run.training["seed"],
    )
    return EvalRun(**{field.name: getattr(run, field.name) for field in fields(run)}, evaluation=evaluation)


@contextmanager
def at_rest(model: "nn.Module") -> Iterator[None]:
    """A context with the model in evaluation mode; afterwards its mode and all random states are as before."""
    import random

    import numpy as np
    import torch

    was_training, states = model.training, (random.getstate(), np.random.get_state())
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.train(was_training)
