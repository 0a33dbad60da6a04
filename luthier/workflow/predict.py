"""Predictions for the evaluation rows, written to generated_predictions.jsonl.

With `predict_with_generate` the model answers the prompts and the answers are compared by BLEU and ROUGE. A reward
model scores the rows.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.files import write_atomically
from luthier.core.log import info, is_main_process
from luthier.data.rows.table import Table
from luthier.workflow.text import TextSide

if TYPE_CHECKING:
    from torch import nn

    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.training.parts import EvalMetrics, Follow
    from luthier.training.trainer import StageTrainer

PREDICTIONS_FILE = "generated_predictions.jsonl"


def predict(run: "TrainRun", trainer: "StageTrainer", data: "PreparedData", text: TextSide) -> dict[str, float]:
    """Write answers to all evaluation prompts to generated_predictions.jsonl. Returns their scores as `predict_*`."""
    from luthier.evals.text_metrics import score_pairs
    from luthier.training.predictions import follow

    start, follows = time.monotonic(), partial(follow, trainer)
    lines = [line for rows in data.prompts.values() for line in answers(run, trainer.policy, rows, text, follows)]
    _save(
        lines, Path(run.training["output_dir"])
    )  # every process has all lines: with sharded weights all generate together
    scores = score_pairs([line["predict"] for line in lines], [line["label"] for line in lines])
    seconds = time.monotonic() - start
    speed = {"predict_runtime": round(seconds, 2), "predict_samples_per_second": round(len(lines) / seconds, 3)}
    metrics = {f"predict_{name}": value for name, value in scores.items()} | speed
    trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def predict_rows(trainer: "StageTrainer", data: "PreparedData", output_dir: Path) -> dict[str, float]:
    """Write the stage's prediction for each evaluation row. Returns loss and metrics as `predict_*`."""
    from luthier.training.predictions import row_predictions

    _save([line for rows in data.eval.values() for line in row_predictions(trainer, rows)], output_dir)
    return trainer.evaluate(metric_key_prefix="predict")


def _save(lines: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
    if is_main_process():
        path = output_dir / PREDICTIONS_FILE
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        info(f"predictions: {path}")


def generation_metrics(run: "TrainRun", data: "PreparedData", text: TextSide) -> "EvalMetrics":
    """For evaluations during training: the scores of the set that the metric prefix names."""

    def measure(model: "nn.Module", prefix: str, follow: "Follow") -> Mapping[str, float]:
        from luthier.evals.text_metrics import score_pairs

        rows = data.prompts[prefix.removeprefix("eval").removeprefix("_")]
        lines = answers(run, model, rows, text, follow)
        return score_pairs([line["predict"] for line in lines], [line["label"] for line in lines])

    return measure


def answers(run: "TrainRun", model: "nn.Module", rows: Table, text: TextSide, follow: "Follow") -> list[dict[str, str]]:
    """One object per row: `prompt`, `predict` (the answer of the model) and `label` (that of the dataset). The last two
    are without the token at which an answer stops."""
    from dataclasses import replace

    from luthier.data.pixels import Prompts
    from luthier.infer.batch import generate_answers
    from luthier.infer.stops import before_stop
    from luthier.infer.types import Settings
    from luthier.workflow.seeing import pixels_for

    settings = Settings.of(run.generating, run.training["seed"])
    num_beams = run.data.eval_num_beams or run.training["generation_num_beams"]
    if num_beams:
        settings = replace(settings, num_beams=num_beams)
    pixels = pixels_for(model, text)
    written = generate_answers(
        model,  # type: ignore[arg-type]
        text.tokenizer,
        rows["input_ids"],
        settings,
        text.fitted.stop_token_ids,
        run.training["per_device_eval_batch_size"],
        seen=None if pixels is None else Prompts(pixels, list(rows)),
        fast_path=run.model.fast_path,
        is_done=follow(rows),
    )

    def decode(ids: list[int], **options: bool) -> str:
        return str(text.tokenizer.decode(ids, **options))

    return [
        {
            "prompt": decode(prompt, skip_special_tokens=False),
            "predict": decode(answer, skip_special_tokens=settings.skip_special_tokens),
            "label": decode(
                before_stop(label, text.fitted.stop_token_ids), skip_special_tokens=settings.skip_special_tokens
            ),
        }
        for prompt, label, answer in zip(rows["input_ids"], rows["labels"], written, strict=True)
    ]
