"""The one trainer: transformers' loop with the loss, the units and the batches of a `Stage` value.

What differs between training methods arrives as that value; no subclass per stage, no question for its name.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType
from transformers.training_args import OptimizerNames

from luthier.core.errors import RunFailed
from luthier.core.files import save_folder_atomically
from luthier.data.collate import tokens_in
from luthier.data.ledger import Ledger
from luthier.model.adapters._merge import unwrap
from luthier.model.adapters._pissa import is_pissa, resume_pissa
from luthier.model.features.rope_scaling import save_beside_adapter
from luthier.model.heads.output_head import OutputHead
from luthier.model.heads.score_head import save_value_head, without_value_head
from luthier.model.processor import PROCESSOR_FILES, FittedProcessor, copy_processor
from luthier.model.save import WEIGHT_FILES, save_adapter
from luthier.model.types import Models
from luthier.stages import Stage, StageState, Sums, Survey
from luthier.training.arguments import accepted
from luthier.training.checkpoints import check_filled, checkpoint_mismatch, saving
from luthier.training.gauges import Gauge
from luthier.training.nonfinite import NonFiniteWatch
from luthier.training.streaming import reading_of

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

    from luthier.model.frozen_models import Companion
    from luthier.training.rollouts import Rollouts

MODEL_FILES = (*WEIGHT_FILES, *PROCESSOR_FILES, "config.json", "generation_config.json")
"""What makes up a model or an adapter beside its tokenizer; of an earlier run none of it stays."""

STAGE_STATE_FILE = "stage_state.json"
"""What the stage remembers from step to step (`luthier.stages.StageState`), in a checkpoint."""

EvalMetrics = Callable[["nn.Module", str], Mapping[str, float]]


class StageTrainer(Trainer):
    """transformers.Trainer for any stage."""

    def __init__(
        self,
        *,
        stage: Stage,
        config: Any,
        model: "nn.Module",
        head: OutputHead,
        args: "Seq2SeqTrainingArguments",
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        train_dataset: "datasets.Dataset | None",
        eval_dataset: "datasets.Dataset | dict[str, datasets.Dataset] | None",
        tokenizer: "PreTrainedTokenizerBase",
        callbacks: "list[TrainerCallback]",
        shuffle: bool = True,
        eval_metrics: EvalMetrics | None = None,
        build_optimizer: "Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer] | None" = None,
        gauges: Sequence[Gauge] = (),
        superseded: Sequence[Path] = (),
        ledger: Ledger | None = None,
        processor: FittedProcessor | None = None,
    ) -> None:
        """`eval_metrics` is asked after every evaluation: (model, metric prefix) -> more metrics, e.g. ROUGE.

        `build_optimizer`: (model, args) -> the optimizer; None leaves it to `optim`. `gauges` are asked at each log.

        `superseded`: checkpoints of an earlier run, which are removed as soon as this run has saved something.

        `ledger`: of the rows for evaluation, which that of streamed rows adds to. `processor` goes with the weights.
        """
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        assert args.output_dir is not None, "the rules of the run ask for it"
        self.output_dir, self.tokenizer, self.policy = args.output_dir, tokenizer, model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile:
            # The head's weight is sharded, or its forward compiled: the model itself has to call it.
            head = replace(head, linear=None)
        self.stage, self.stage_config, self.head = stage, config, head
        self.build_optimizer, self.gauges = build_optimizer, gauges
        self.collate, self.shuffle, self.eval_metrics, self.superseded = collate, shuffle, eval_metrics, superseded
        self.processor = processor
        # The loss is divided by the units of the whole optimizer step, so accumulation must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.num_trained_tokens = 0
        self._metrics: dict[str, tuple[Tensor, float]] = {}
        self.companions: Mapping[str, Companion] = {}
        self.watch = NonFiniteWatch(tokenizer, Path(args.output_dir))
        self.stage_state: StageState = {}
        self._train_start_seconds = 0.0
        self.reading = reading_of(self, ledger)
        self.rollouts: Rollouts | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        from huggingface_hub.errors import HTTPError  # of whichever library the hub's client is built on

        try:
            super().init_hf_repo(token, private)
        except (OSError, ValueError, HTTPError) as fault:
            raise RunFailed(
                f"push_to_hub: the repository cannot be made ({str(fault).splitlines()[0]})"
                " -> check hub_model_id, hub_token and the network, or leave push_to_hub out"
            ) from fault

    # -- training --------------------------------------------------------------------------------

    def create_optimizer(self, model: "nn.Module | None" = None) -> Any:
        with accepted("optim", str(OptimizerNames(self.args.optim).value)):
            if self.build_optimizer is not None:
                self.optimizer = self.build_optimizer(self.policy if model is None else model, self.args)
                return self.optimizer
            return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not self.args.lr_scheduler_kwargs:
            # transformers has no default here; that of the reference is a third of what is left after the warm-up.
            num_left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": num_left - num_left // 3}
        with accepted("lr_scheduler_type", str(SchedulerType(self.args.lr_scheduler_type).value)):
            return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> Any:
        if self.reading is None:
            return super().get_train_dataloader()
        return self.reading.loader(self._train_batch_size, self.collate)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.shuffle:
            return super()._get_train_sampler(train_dataset)
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(rows)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Not one step more than `max_steps`: transformers takes one when it goes on from the last step of a run."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of one optimizer step and their units; answers of the policy's own where the stage asks."""
        if self.rollouts is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.rollouts.batches(self, len(list(islice(epoch_iterator, num_batches))))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> "Tensor":
        """The units of one optimizer step over all its micro-batches and all processes."""
        self.watch.require_finite_losses(self.state.global_step)
        if self.reading is not None:
            self.reading.take(batch_samples)
        counts = [(self.stage.units(batch), tokens_in(batch)) for batch in batch_samples]
        sums = torch.tensor([[sum(units) for units in zip(*counts, strict=True)]], device=device)
        num_units, num_tokens = self.accelerator.gather(sums).sum(0)
        self.num_trained_tokens += int(num_tokens)
        if self.stage.survey is not None:
            self.stage_state = self._surveyed(self.stage.survey, self.model_wrapped, batch_samples, self.stage_state)
        if not self._train_start_seconds:
            self._train_start_seconds = time.monotonic()
        return num_units

    def compute_loss(
        self, model: "nn.Module", inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        models = Models(model, self.head, self.companions)
        output = self.stage.loss(models, inputs, self.stage_config, state=self.stage_state, training=True)
        self.watch.note(inputs, output.total)
        _add(self._metrics, output.metrics)
        # Gradients are averaged over processes, and this loss is already a share of the whole step.
        return output.total / num_items_in_batch * self.accelerator.num_processes

    def _surveyed(self, survey: Survey, model: Any, batches: Iterable[Any], state: StageState) -> StageState:
        """What the stage knows once it has seen these batches, those of all processes together."""
        sums: dict[str, tuple[Tensor, float]] = {}
        for batch in batches:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(batch)
                _add(
                    sums, survey.sums(Models(model, self.head, self.companions), inputs, self.stage_config, state=state)
                )
        totals = self._over_processes(sums)
        means = {name: (total / count if count else 0.0, count) for name, (total, count) in totals.items()}
        return survey.learn(state, means, self.stage_config)

    def _over_processes(self, sums: Sums) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over all processes; every process has the same names."""
        if not sums:
            return {}
        device = self.args.device
        pairs = [
            [total.detach().double().to(device), torch.tensor(count).double().to(device)]
            for total, count in sums.values()
        ]
        table = torch.stack([torch.stack(pair) for pair in pairs])
        rows = self.accelerator.gather(table[None]).sum(0).tolist()
        return {name: (total, count) for name, (total, count) in zip(sums, rows, strict=True)}

    def add_metrics(self, sums: Sums) -> None:
        """To be logged with the metrics of the loss."""
        _add(self._metrics, sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and not self.num_trained_tokens:
            return  # the run was complete already, so there is no mean loss to tell
        if "loss" in logs:
            self.watch.require_finite_losses(self.state.global_step)
            if not math.isfinite(logs["loss"]):
                raise self.watch.failure(f"the loss became {logs['loss']}", self.state.global_step)
            means = {
                name: total / count for name, (total, count) in self._over_processes(self._metrics).items() if count
            }
            logs |= {**means, **self.stage.derived(means)}
            self._metrics = {}
            logs["throughput"] = round(self.throughput(), 2)
            for gauge in self.gauges:
                logs |= gauge()
        super().log(logs, start_time)

    def throughput(self) -> float:
        """Tokens per second since training began, padding not counted."""
        return self.num_trained_tokens / max(time.monotonic() - self._train_start_seconds, 1e-9)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics as sums over the whole set divided by their counts, so the batch size does not matter."""
        model = self._wrap_model(self.policy, training=False)
        if not self.accelerator._models and model is self.policy:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        # Reading batches draws random numbers, which the training that goes on afterwards must not miss.
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            totals = self._over_processes(self._sums(model, dataloader))
        means = {name: t / n if n else math.nan for name, (t, n) in totals.items() if n or name == "loss"}
        means |= self.stage.derived(means)
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        if self.eval_metrics is not None:
            more = self.eval_metrics(model, metric_key_prefix)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in more.items()}
        # Metrics are all there is: predictions are written by `luthier.workflow.predict`.
        return EvalLoopOutput(np.empty(0), None, metrics, self.num_examples(dataloader))

    def _sums(self, model: "nn.Module", dataloader: Any) -> "dict[str, tuple[Tensor, float]]":
        """Loss and metrics of this process: name -> (sum, count)."""
        state: StageState = {}
        if self.stage.survey is not None:
            state = self._surveyed(self.stage.survey, model, dataloader, state)
        sums: dict[str, tuple[Tensor, float]] = {}
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            models = Models(model, self.head, self.companions)
            with torch.no_grad(), self.compute_loss_context_manager():
                output = self.stage.loss(models, inputs, self.stage_config, state=state, training=False)
            _add(sums, {"loss": (output.total, self.stage.units(inputs)), **output.metrics})
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return sums

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        asked = self.args.metric_for_best_model
        if asked is not None and f"eval_{asked.removeprefix('eval_')}" not in metrics:
            raise RunFailed(
                f"metric_for_best_model: {asked}: evaluation gives {', '.join(sorted(metrics))}, but not that"
            )
        return super()._determine_best_metric(metrics, trial)

    # -- saving and going on ---------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "nn.Module | None" = None) -> None:
        with checkpoint_mismatch(resume_from_checkpoint):
            if is_pissa(self.policy):
                resume_pissa(self.policy, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reading is not None:
            self.reading.restore(Path(resume_from_checkpoint))
        if self.rollouts is not None:
            self.rollouts.load(Path(resume_from_checkpoint), self)
        saved = Path(resume_from_checkpoint, STAGE_STATE_FILE)
        if saved.is_file():
            self.stage_state = json.loads(saved.read_text(encoding="utf-8"))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and is_pissa(self.policy):
            resume_pissa(self.policy, Path(best))
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_filled(self.policy, load_result.missing_keys, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoint_mismatch(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers does, except that peft need not ask the hub whether the vocabulary of the base has changed.

        An embedding that learns is among the adapter's `modules_to_save`.
        """
        if self.args.should_save:
            Path(output_dir or self.output_dir).mkdir(parents=True, exist_ok=True)
            save_value_head(Path(output_dir or self.output_dir), self.policy, state_dict)
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, without_value_head(self.policy, state_dict))
        elif self.args.should_save:
            folder = output_dir or self.output_dir
            save_adapter(self.model, Path(folder), state_dict)
            save_beside_adapter(Path(folder), unwrap(self.model).config)
            self.tokenizer.save_pretrained(folder)
            torch.save(self.args, Path(folder, TRAINING_ARGS_NAME))
        if self.args.should_save:
            copy_processor(unwrap(self.model), Path(output_dir or self.output_dir), self.processor)

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        name = f"checkpoint-{self.state.global_step}"
        self.superseded = [folder for folder in self.superseded if folder.name != name]
        with saving(self.output_dir, name, self.args.should_save):
            # Every process writes its random state here: after the old folder is gone, before the manifest is made.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.stage_state and self.args.should_save:
                Path(self.output_dir, name, STAGE_STATE_FILE).write_text(json.dumps(dict(self.stage_state)))
            if self.reading is not None:
                output_dir = Path(self.output_dir)
                self.reading.save(output_dir / name, output_dir, writes=self.args.should_save)
            if self.rollouts is not None:
                self.rollouts.save(Path(self.output_dir, name), self)
            self.accelerator.wait_for_everyone()
        self._remove_superseded()

    def save_final(self) -> None:
        """The weights of the finished run into `output_dir`, in the place of any that are there.

        Raises `RunFailed` if they do not fit on the disk or are not finite; what was there is kept then.
        """
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        with saving(self.output_dir, None, self.args.should_save):
            if self.args.should_save:
                with save_folder_atomically(Path(self.output_dir), replaces=MODEL_FILES) as folder:
                    self.save_model(str(folder))
            else:
                self.save_model()
        self._remove_superseded()

    def _remove_superseded(self) -> None:
        if self.args.should_save:
            for folder in self.superseded:
                shutil.rmtree(folder, ignore_errors=True)
        self.superseded = ()


def _add(sums: "dict[str, tuple[Tensor, float]]", more: Sums) -> None:
    """Adds each (sum, count) to that of the same name."""
    for name, (total, count) in more.items():
        total_before, count_before = sums.get(name, (0, 0))
        sums[name] = (total_before + total.detach(), count_before + count)
