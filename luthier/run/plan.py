"""`luthier plan RUN`: what a run will compute, how much memory and time it takes, before any weight is loaded."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.core.machine import Machine
    from luthier.workflow.plan.make import Plan, Sketch
    from luthier.workflow.plan.room import Room

UNITS = {"GB": 10**9, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says beside the run file."""

    words: Sequence[str]
    """The run file and its overrides."""
    as_json: bool = False
    as_table: bool = False
    num_processes: tuple[int, ...] = ()
    accelerator_bytes: int | None = None


def main(argv: list[str]) -> int:
    asked = read_options(argv)

    from luthier.config.load import read_source
    from luthier.config.runs import TrainRun
    from luthier.workflow.launch.processes import require_allowed
    from luthier.workflow.preflight import load_checked, tell_warnings

    written = read_source(asked.words)
    run = load_checked("train", written, begins=False, writes=False)
    assert isinstance(run, TrainRun)
    counts = asked.num_processes or (num_processes_of(run),)
    if not asked.as_table:  # which has a line for what is refused
        require_allowed(run, written, counts[0])
    tell_warnings(run)

    from luthier.core.importing import without_collection

    with without_collection():
        from luthier.core.machine import detect
        from luthier.data.prepare import prepare
        from luthier.training.arguments import require_batch, require_groups, require_one_group
        from luthier.workflow.plan.libraries import missing_bytes
        from luthier.workflow.plan.make import sketch
        from luthier.workflow.plan.room import room_of
        from luthier.workflow.plan.shape import Unplanned
        from luthier.workflow.text import load_text_side

        stage, machine = STAGES.get(run.stage), detect()
        text = load_text_side(run, reads_chat=stage.rows.reads_chat, needs_weights=False)
    for count in counts:
        require_groups(run.parallel.sp_size, count)
        require_one_group(run.parallel.tp_size, count)
    if asked.as_table and run.parallel.tp_size > 1:
        raise InvalidInput("plan: --table compares engines, and tp_size is one itself -> leave --table or tp_size out")
    machines = [machine_for(machine, count, asked.accelerator_bytes) for count in counts]
    data = prepare(run, stage.rows, text.encoding)
    for line in data.ledger.summary():
        print(line, file=sys.stderr)
    if run.trains and data.table is not None and stage.rollout(run.method) is None and not asked.as_table:
        require_batch(run, counts[0], len(data.table))
    missing = missing_bytes(run, machines[0].device)
    rooms = [room_of(machine, missing) for machine in machines]
    try:
        with without_collection():  # imports the code of the model
            drawn = sketch(run, stage, text, machines[0])
        show = _table if asked.as_table else _json if asked.as_json else _lines
        lines = show(run, stage, text, data, machines, rooms, drawn)
    except Unplanned as fault:
        raise InvalidInput(
            f"plan: the memory of this run has no model: {fault} -> start it with a small max_steps"
        ) from fault
    print("\n".join(lines))
    return 0


def num_processes_of(run: "TrainRun") -> int:
    """That `train` would start: as many as the environment or the run asks for, else one for each accelerator."""
    from luthier.core.machine import num_accelerators
    from luthier.workflow.launch.processes import num_processes_asked

    sharing = max(run.parallel.sp_size, run.parallel.tp_size)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return num_processes_asked(run) or max(started, num_accelerators(), sharing)


def _lines(*what: Any) -> list[str]:
    from luthier.workflow.plan.text import lines_of

    return list(lines_of(_plan(*what)))


def _json(*what: Any) -> list[str]:
    from luthier.workflow.plan.text import as_json

    return [json.dumps(as_json(_plan(*what)), indent=1)]


def _plan(
    run: Any, stage: Any, text: Any, data: Any, machines: "Sequence[Machine]", rooms: "Sequence[Room]", drawn: "Sketch"
) -> "Plan":
    from luthier.workflow.plan.make import make_plan

    return make_plan(run, stage, text, data, machines[0], drawn=drawn, room=rooms[0])


def _table(
    run: Any, stage: Any, text: Any, data: Any, machines: "Sequence[Machine]", rooms: "Sequence[Room]", drawn: "Sketch"
) -> list[str]:
    """Every engine with each number of processes. Raises `Unplanned` if there is no plan of any."""
    from luthier.workflow.plan.engine import ENGINES, Engine
    from luthier.workflow.plan.make import make_plan
    from luthier.workflow.plan.refusals import refusal_of
    from luthier.workflow.plan.shape import Unplanned
    from luthier.workflow.plan.text import Absent, table_of

    plans: list[Plan | Absent] = []
    for machine, room in zip(machines, rooms, strict=True):
        for name in ENGINES:
            engine = Engine(name, machine.world_size)
            if (refusal := refusal_of(run, engine)) is not None:
                plans.append(Absent(engine, refusal))
                continue
            try:
                plans.append(make_plan(run, stage, text, data, machine, engine, drawn, room))
            except Unplanned as fault:
                plans.append(Absent(engine, str(fault)))
    reasons = [plan.reason for plan in plans if isinstance(plan, Absent)]
    if len(reasons) == len(plans):
        raise Unplanned("; ".join(dict.fromkeys(reasons)))
    return list(table_of(plans))


def machine_for(machine: "Machine", num_processes: int, accelerator_bytes: int | None) -> "Machine":
    """This machine, or one with an accelerator of `accelerator_bytes` for each process."""
    if accelerator_bytes is None:
        return replace(machine, world_size=num_processes)
    return replace(
        machine,
        device="cuda",
        num_accelerators=num_processes,
        bf16=True,
        fp16=True,
        device_memory_bytes=accelerator_bytes,
        world_size=num_processes,
        is_assumed=True,
    )


def read_options(argv: Sequence[str]) -> Asked:
    """Raises `InvalidInput` for an option that is not well formed, and without a run file."""
    words, found = list(argv), {}
    for name in ("--json", "--table"):
        found[name] = name in words
        words = [word for word in words if word != name]
    counts = _value_of("--processes", words)
    memory = _value_of("--accelerator", words)
    num_processes = tuple(_count(text) for text in counts.split(",")) if counts else ()
    if not words:
        raise InvalidInput("plan: which run file? e.g. `luthier plan run.yaml`")
    if found["--table"] and found["--json"]:
        raise InvalidInput("plan: --table and --json are two output formats -> leave one of them out")
    if len(num_processes) > 1 and not found["--table"]:
        raise InvalidInput("plan: --processes: several numbers make a table -> add --table, or give one number")
    if found["--table"] and not num_processes:
        raise InvalidInput("plan: --table compares engines of several processes -> add e.g. --processes 8,64")
    return Asked(words, found["--json"], found["--table"], num_processes, None if memory is None else _bytes(memory))


def _value_of(option: str, words: list[str]) -> str | None:
    """Takes `--option VALUE` or `--option=VALUE` out of the words."""
    for index, word in enumerate(words):
        if word == option:
            if index + 1 == len(words):
                raise InvalidInput(f"plan: {option} needs a value")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"{option}="):
            del words[index]
            return word.partition("=")[2]
    return None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInput(f"plan: --processes: {text!r} is not a number of processes -> e.g. --processes 8")
    return int(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text)
    if not found:
        raise InvalidInput(f"plan: --accelerator: {text!r} is not a size of memory -> e.g. --accelerator 80GB")
    return round(float(found[1]) * UNITS[found[2]])
