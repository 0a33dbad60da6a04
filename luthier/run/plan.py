"""`luthier plan RUN`: what a run will compute, how much memory and time it takes, before any weight is loaded."""

import json
import sys

from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES


def main(argv: list[str]) -> int:
    as_json = "--json" in argv
    words = [word for word in argv if word != "--json"]
    if not words:
        raise InvalidInput("plan: which run file? e.g. `luthier plan run.yaml`")

    from luthier.config.load import read_source
    from luthier.config.runs import TrainRun
    from luthier.workflow.preflight import load_checked

    run = load_checked("train", read_source(words), begins=False, writes=False)
    assert isinstance(run, TrainRun)

    from luthier.core.machine import detect
    from luthier.data.prepare import prepare
    from luthier.workflow.plan import text as text_of_plan
    from luthier.workflow.plan.libraries import import_what_training_needs
    from luthier.workflow.plan.make import make_plan
    from luthier.workflow.plan.shape import Unplanned
    from luthier.workflow.text import load_text_side

    stage, machine = STAGES.get(run.stage), detect()
    import_what_training_needs(run)
    text = load_text_side(run, reads_chat=stage.rows.reads_chat)
    data = prepare(run, stage.rows, text.encoding)
    for line in data.ledger.summary():
        print(line, file=sys.stderr)
    try:
        plan = make_plan(run, stage, text, data, machine)
    except Unplanned as fault:
        raise InvalidInput(
            f"plan: the memory of this run has no model: {fault} -> start it with a small max_steps"
        ) from fault
    print(json.dumps(text_of_plan.as_json(plan), indent=1) if as_json else "\n".join(text_of_plan.lines_of(plan)))
    return 0
