"""The part of the trainer that reads checkpoints: to resume, to go back, and to end with the best one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from luthier.model.adapters._merge import unwrap
from luthier.model.adapters._pissa import is_pissa, resume_pissa
from luthier.model.adapters._series import check_resumed
from luthier.model.compat.loaded_adapters import keeping_formats
from luthier.model.compat.split_checkpoints import saving_split_layers
from luthier.training.averaged import leave_averaged
from luthier.training.callbacks.interrupt import StopOnSignal
from luthier.training.callbacks.save_after_epoch import SaveAfterEpoch
from luthier.training.checkpoints import split_state, store
from luthier.training.checkpoints.kept_settings import telling_kept_settings
from luthier.training.checkpoints.resumed_rates import follow_schedule, keeping_rates
from luthier.training.checkpoints.weights import check_filled, checkpoint_mismatch, taking_saved_names
from luthier.training.distributed.engines import (
    building_operators,
    count_steps_again,
    is_plain_sgd,
    load_schedule,
    require_same_engine,
)
from luthier.training.parts import TrainingParts

if TYPE_CHECKING:
    from torch import nn
    from transformers import Seq2SeqTrainingArguments

    from luthier.stages import StageState

STAGE_STATE_FILE = "stage_state.json"
"""In a checkpoint: the state of the stage (`luthier.stages.StageState`)."""


class ResumingTrainer(Trainer):
    """transformers.Trainer that reads checkpoints of every engine and adapter, and refuses those of another run."""

    def __init__(self, args: "Seq2SeqTrainingArguments", parts: TrainingParts, **words: Any) -> None:
        with saving_split_layers(args, parts.models.policy):
            super().__init__(args=args, **words)
        assert args.output_dir is not None, "the rules require output_dir"
        self.parts, self.policy, self.output_dir = parts, parts.models.policy, args.output_dir
        self.stage_state: StageState = {}
        self.last_saved: Path | None = None
        """The last checkpoint that this run has written or resumed from."""
        self.stop = StopOnSignal(parts.recovery.save_on_signal_seconds)
        self.add_callback(self.stop)
        self.add_callback(SaveAfterEpoch())

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit DeepSpeed is an error in one sentence."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with building_operators():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "nn.Module | None" = None) -> None:
        self._load_learned(Path(resume_from_checkpoint), model)
        if self.parts.reading is not None:
            self.parts.reading.restore(Path(resume_from_checkpoint))
        self.last_saved = Path(resume_from_checkpoint)

    def _load_learned(self, checkpoint: Path, model: "nn.Module | None" = None) -> None:
        """Weights, sampled answers and the state of the stage; with DeepSpeed also the optimizer."""
        check_resumed(self.policy, checkpoint)
        require_same_engine(checkpoint, self.accelerator)
        split_state.require_same_split(checkpoint, is_split=self.is_distributed_loading_by_transformers)
        with checkpoint_mismatch(str(checkpoint)):
            if self.is_deepspeed_enabled:
                whole = not isinstance(self.model, PeftModel)
                deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint), load_module_strict=whole)
                count_steps_again(self.model_wrapped.optimizer)
            elif is_pissa(self.policy):
                resume_pissa(self.policy, checkpoint)
            elif self._fills_split_weights:
                split_state.fill_weights(unwrap(self.policy), checkpoint)
            else:
                with taking_saved_names(self.policy, checkpoint), keeping_formats(self.policy):
                    super()._load_from_checkpoint(str(checkpoint), model)
        if self.parts.rollouts is not None:
            self.parts.rollouts.load(checkpoint)
        saved = checkpoint / STAGE_STATE_FILE
        self.stage_state = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}

    @property
    def _fills_split_weights(self) -> bool:
        """Whether each process takes its part of whole weights. peft does that for adapters."""
        return self.is_distributed_loading_by_transformers and not isinstance(self.model, PeftModel)

    def go_back(self) -> Path | None:
        """Take what was learned from the last checkpoint; the schedule, the rows and the random numbers go on.

        Returns the checkpoint, and None if there is none that all processes can read.
        """
        saved = self.last_saved
        is_there = saved is not None and store.is_whole(saved)
        if saved is None or not all(gather_object([is_there])):
            return None
        assert self.lr_scheduler is not None and self.optimizer is not None, "training has begun"
        with keeping_rates(self.optimizer, self.lr_scheduler):
            self._load_learned(saved, self.model_wrapped if self.is_fsdp_enabled else None)
            self._load_optimizer_and_scheduler(str(saved))
        if self.parts.rollouts is not None:
            self.parts.rollouts.rows = []  # of another policy; the next step samples again
        return saved

    def _load_best_model(self) -> None:
        if self.stop.was_interrupted:
            return
        leave_averaged(self.optimizer)
        best = self.state.best_model_checkpoint
        if best is not None:
            store.require_whole_best(Path(best))
        if best is not None and is_pissa(self.policy):
            resume_pissa(self.policy, Path(best))
        elif best is not None and self._fills_split_weights:
            split_state.fill_weights(unwrap(self.policy), Path(best))
        else:
            with taking_saved_names(self.policy, Path(best or "")), keeping_formats(self.policy):
                super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_filled(self.policy, load_result.missing_keys, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoint_mismatch(checkpoint or ""), telling_kept_settings(self.optimizer, checkpoint):
            if checkpoint is not None and self.is_fsdp_enabled and is_plain_sgd(self.optimizer):
                load_schedule(Path(checkpoint), self.optimizer, self.lr_scheduler)
            elif checkpoint is not None and self.is_distributed_loading_by_transformers:
                split_state.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            follow_schedule(self.lr_scheduler)
