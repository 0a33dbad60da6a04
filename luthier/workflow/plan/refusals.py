"""Why `luthier train` would refuse an engine that the table of a plan compares: the rules between keys say it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.config.rules.table import broken_rules
from luthier.workflow.launch.processes import in_one_of
from luthier.workflow.plan.engine import Engine

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

SWITCHES = ("deepspeed", "fsdp")


def refusal_of(run: "TrainRun", engine: Engine) -> str | None:
    """The reason, with the key that does not go together with this engine; None if the run may take it."""
    asked = replace(run, training=run.training.changed(keys_of(engine), without=SWITCHES))
    with in_one_of(engine.num_processes):
        for rule in broken_rules("train", asked, writes=False):
            if not (rule.only_warns or rule.is_local):
                return f"{rule.keys[0]} {rule.reason}"
    return None


def keys_of(engine: Engine) -> Mapping[str, Any]:
    """The key that chooses this engine, and its value."""
    if engine.is_zero:
        return {"deepspeed": {"zero_optimization": {"stage": int(engine.name.removeprefix("zero"))}}}
    return {"fsdp": True} if engine.name == "fsdp2" else {}
