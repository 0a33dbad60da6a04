"""`luthier train RUN`: a run file in, a fine-tuned model out. One path for every stage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import ADAPTERS, STAGES
from luthier.core.log import info, warn
from luthier.run.encoding import TextSide, load_text_side

if TYPE_CHECKING:
    from torch import nn

    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.train.fit import RunResult
    from luthier.train.trainer import EvalMetrics, StageTrainer


def main(argv: list[str]) -> int:
    from luthier.config.load import load_train
    from luthier.run.launch import launch_if_needed

    run = load_train(argv)
    status = launch_if_needed(argv)
    if status is not None:
        return status
    result = train(run)
    for metrics in result.metrics.values():
        for name, value in metrics.items():
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"saved: {result.output_dir}")
    return 130 if result.was_interrupted else 0


def train(run: "TrainRun") -> "RunResult":
    """Everything that a training run file asks for. Bad data fails before weights are loaded.

    detect the machine -> tokenizer and chat format -> data -> model -> train, evaluate, predict -> report
    """
    from luthier.core.machine import detect
    from luthier.data.prepare import prepare
    from luthier.train.arguments import training_arguments
    from luthier.train.checkpoints import require_writable, resume_point

    for warning in run.warnings:
        warn(str(warning))
    stage, output_dir = STAGES.get(run.stage), Path(run.training["output_dir"])
    require_writable(output_dir)
    resume_from = None
    if run.trains:
        resume_from = resume_point(output_dir, run.training["resume_from_checkpoint"], run.training["overwrite_output_dir"])
    machine = detect()
    args = training_arguments(run, machine)
    text = load_text_side(run)
    data = prepare(run, stage, text.encoding)
    report_data(output_dir, data, text)
    model, concatenates = load_policy(run, machine, text)
    trainer = make_trainer(run, stage, model, text, data, args, concatenates=concatenates)
    return go(run, trainer, data, text, resume_from)
