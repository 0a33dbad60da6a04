"""Plans of runs, for tests."""

from typing import Any

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.prepare import prepare
from luthier.workflow.plan.make import make_plan
from luthier.workflow.text import load_text_side


def sides(keys: dict[str, Any]) -> tuple[Any, ...]:
    """What `make_plan` takes: run, stage, text side, data and machine."""
    run, machine = load_train(keys), detect()
    stage = STAGES.get(run.stage)
    text = load_text_side(run, reads_chat=stage.rows.reads_chat)
    return run, stage, text, prepare(run, stage.rows, text.encoding), machine


def plan_of(keys: dict[str, Any]) -> Any:
    return make_plan(*sides(keys))
