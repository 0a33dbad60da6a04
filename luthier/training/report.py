"""What a run writes besides its weights: metrics, plots, model card, the resolved run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.encode import escaped, to_yaml
from luthier.config.masking import is_secret, masked
from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import DiskFaults, write_atomically
from luthier.core.kinds import ADAPTERS
from luthier.core.log import info, warn
from luthier.core.manifest import MANIFEST_NAME, read_manifest, record_again, write_manifest
from luthier.core.versions import require
from luthier.data.ledger import EVAL_LEDGER_FILE
from luthier.training.checkpoints.foreign import TRAINER_STATE

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.training.trainer import StageTrainer

SMOOTHED_SHARE = 0.1
"""The smoothed line of a plot averages over about this share of the points."""


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


RESULTS = ("*_results.json", "generated_predictions.jsonl", EVAL_LEDGER_FILE)
RESULTS_OF_TRAINING = (*RESULTS, "training_*.png")
"""Metrics and plots, which belong to the weights beside them."""


WRITTEN_BY_EVALUATION = (*RESULTS, "trainer_log.jsonl")


def record_evaluation(output_dir: Path) -> None:
    """A run that only evaluates may write to the folder of a training run, whose manifest names the same files."""
    if not (output_dir / MANIFEST_NAME).exists():
        return
    paths = [path for pattern in WRITTEN_BY_EVALUATION for path in output_dir.glob(pattern)]
    try:
        record_again(output_dir, paths)
    except OutputError as fault:
        warn(f"{fault}; it stays as it is")


def descriptions_in(output_dir: Path) -> list[Path]:
    """What says that the weights there are those of a finished run, and how good they are. The manifest is first."""
    found = (path for pattern in RESULTS_OF_TRAINING for path in output_dir.glob(pattern))
    return [output_dir / MANIFEST_NAME, *found]


def described_step(output_dir: Path) -> int | None:
    """The step at which the run ended that the manifest there describes; None if there is none."""
    try:
        read_manifest(output_dir)
        step = json.loads((output_dir / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    except (OutputError, OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def describes_step(output_dir: Path, step: int) -> bool:
    """Whether a finished run that ended at this step left its weights there and all that describes them."""
    return described_step(output_dir) == step and all(
        (output_dir / name).is_file() for name in read_manifest(output_dir)["files"]
    )


def nothing_trained(output_dir: Path, checkpoint: Path | None, data_fingerprint: str) -> str:
    """The warning of a run that found itself finished. `data_fingerprint`: of the rows that this run has read."""
    text = f"nothing was trained: {checkpoint} is the last step of a run that is finished"
    if read_manifest(output_dir).get("data") != data_fingerprint:
        text += ", and it was trained or evaluated on other data than this run names"
    return (
        f"{text}; the files that describe the weights stay those of that run"
        " -> set overwrite_output_dir: true or another output_dir to train from scratch"
    )


@contextmanager
def describing(output_dir: Path) -> Iterator[None]:
    """Wraps writing the files that describe the weights. Raises `RunFailed` if the disk fails."""
    try:
        with DiskFaults():
            yield
    except OSError as fault:
        raise RunFailed(
            f"{output_dir}: the weights are saved, but not all files that describe them ({fault.strerror or fault})"
            " -> free some space; the weights can be used as they are"
        ) from fault


def save_metrics(output_dir: Path, split: str, metrics: Mapping[str, float]) -> None:
    """`<split>_results.json`, and its keys added to `all_results.json`."""
    write_json(output_dir / f"{split}_results.json", dict(metrics))
    path = output_dir / "all_results.json"
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        warn(f"{path}: is incomplete and is written from scratch")
        earlier = {}
    write_json(path, {**earlier, **metrics})


def plot_history(output_dir: Path, history: Sequence[Mapping[str, Any]]) -> list[Path]:
    """One PNG per metric that was logged: training_loss.png, training_eval_loss.png, ... A single value is a dot."""
    require("matplotlib", "plot", "plot_loss: true")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    left_out = {"step", "epoch", "total_flos", "learning_rate", "throughput", "vram_allocated", "vram_reserved"}
    left_out |= {"num_input_tokens_seen"}
    names = {name for logs in history for name in logs} - left_out
    paths = []
    for name in sorted(names):
        points = [(logs["step"], logs[name]) for logs in history if isinstance(logs.get(name), int | float)]
        if name.endswith(("_runtime", "_per_second", "train_loss", "preparation_time")) or not points:
            continue
        steps, values = zip(*points, strict=True)
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel=name, title=f"{name} of {output_dir.name}")
        axes.plot(steps, values, color="#9db8d9", label="logged", marker="o" if len(points) == 1 else None)
        axes.plot(steps, smoothed(values), color="#1f4e8c", label="smoothed")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        path = output_dir / f"training_{name.replace('/', '_')}.png"
        figure.savefig(path, dpi=100)
        paths.append(path)
    if not paths:
        warn("plot_loss: no metric was logged, so there is nothing to plot -> log them (logging_strategy)")
    for path in paths:
        info(f"plot: {path}")
    return paths


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the points, with bias correction."""
    past = 1 - 2 / (max(3.0, SMOOTHED_SHARE * len(values)) + 1)
    line, average, weight = [], 0.0, 0.0
    for value in values:
        average = past * average + (1 - past) * value
        weight = past * weight + (1 - past)
        line.append(average / weight)
    return line


def model_card(
    run: "TrainRun",
    base_model: str,
    metrics: Mapping[str, Mapping[str, float]],
    trained_on: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of the output folder, with the metadata that model hubs read.

    `trained_on`: the entries of `luthier.training.checkpoints.trained_on` if training continued with other rows.
    """
    import yaml

    keys = (
        "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
        "lr_scheduler_type", "optim", "seed",
    )  # fmt: skip
    is_adapter = ADAPTERS.get(run.finetuning_type).adds_weights
    header: dict[str, Any] = {"base_model": base_model, "library_name": "peft" if is_adapter else "transformers"}
    header |= {"license": "other", "tags": ["luthier", run.stage, run.finetuning_type, "generated_from_trainer"]}
    if run.data.dataset:
        header["datasets"] = list(run.data.dataset)
    lines = ["---", yaml.safe_dump(header, allow_unicode=True, sort_keys=False).strip(), "---", ""]
    lines += [f"# {Path(run.training['output_dir']).name}", ""]
    sets = ", ".join(run.data.dataset) or "no dataset"
    lines += [f"`{base_model}`, fine-tuned by {run.stage} ({run.finetuning_type}) on {sets} with Luthier.", ""]
    for before, after in pairwise(trained_on):
        named = before["keys"].get("dataset") or "no name"
        lines += [f"Up to step {after['from_step']} it was trained on other rows ({named}).", ""]
    lines += ["## Training", "", "| key | value |", "|---|---|"]
    lines += [f"| {key} | {run.training[key]} |" for key in keys]
    for split, values in metrics.items():
        lines += ["", f"## {split.capitalize()} results", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in values.items() if isinstance(value, int | float)]
    return "\n".join(lines) + "\n"


DECISIVE_KEYS = (
    "seed", "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps",
)  # fmt: skip
"""Training keys that decide the result; run.yaml has them even if unset, since defaults change between releases."""


def resolved_run(run: "TrainRun") -> dict[str, Any]:
    """Every key in effect except secrets: the user's keys, and the defaults of the sections and variants."""
    sections = (
        run.model,
        run.data,
        run.method,
        run.adapter,
        run.finetuning,
        run.recovery,
        run.parallel,
        run.generating,
        *run.optimizers.values(),
    )
    defaults = {name: value for section in sections for name, value in asdict(section).items()}
    decisive = {name: run.training[name] for name in DECISIVE_KEYS}
    values = {"stage": run.stage, "finetuning_type": run.finetuning_type, **defaults, **decisive}
    values |= {**run.training.given, **run.given}
    # Null is mostly the default and left out, but a key that the user set to null may have another default.
    in_effect = {name: value for name, value in values.items() if value not in (None, ()) or name in run.given}
    return masked({name: value for name, value in in_effect.items() if value != () and not is_secret(name)})


def finish_training(
    run: "TrainRun",
    trainer: "StageTrainer",
    metrics: Mapping[str, Mapping[str, float]],
    base_model: str,
    facts: Mapping[str, Any],
) -> None:
    """Everything in `output_dir` besides weights, metrics and log; the manifest comes last and covers all files."""
    output_dir = Path(run.training["output_dir"])
    trainer.save_state()
    write_atomically(output_dir / "README.md", model_card(run, base_model, metrics, facts.get("trained_on", ())))
    write_atomically(output_dir / "run.yaml", to_yaml(escaped(resolved_run(run))))
    if run.finetuning.plot_loss:
        plot_history(output_dir, trainer.state.log_history)
    write_manifest(output_dir, **facts)
