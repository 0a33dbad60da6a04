"""The part of the trainer that saves: checkpoints, the final weights, and what belongs to them."""

import json
import time
from abc import abstractmethod
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from peft import PeftModel
from transformers.trainer import TRAINING_ARGS_NAME

from luthier.core.drafts import draft_name, remove
from luthier.core.errors import RunFailed
from luthier.core.files import save_folder_atomically
from luthier.core.log import info, warn
from luthier.data.ledger import LEDGER_FILE, Ledger
from luthier.model import save
from luthier.model.adapters._merge import unwrap
from luthier.model.features.rope_scaling import BESIDE_ADAPTER, save_beside_adapter
from luthier.model.heads.score_head import save_value_head, without_value_head
from luthier.model.media.processor import PROCESSOR_FILES
from luthier.model.sharded import gathered
from luthier.training import arguments
from luthier.training.averaged import averaged, leave_averaged
from luthier.training.callbacks.interrupt import GaveUp
from luthier.training.checkpoints import split_state, store
from luthier.training.checkpoints.foreign import TRAINER_STATE
from luthier.training.checkpoints.shared_save import SharedSave
from luthier.training.cut_batches import RandomState, can_begin_again
from luthier.training.distributed.engines import gathering_whole
from luthier.training.parts import TrainingParts
from luthier.training.report import write_json
from luthier.training.resuming import STAGE_STATE_FILE, ResumingTrainer
from luthier.training.unlogged import KEY as UNLOGGED
from luthier.training.unlogged import Unlogged
from luthier.training.watch.nonfinite import NonFiniteWatch

if TYPE_CHECKING:
    from torch import nn
    from transformers import Seq2SeqTrainingArguments

    from luthier.stages import StageState

MODEL_FILES = (*save.WEIGHT_FILES, *PROCESSOR_FILES, "config.json", "generation_config.json")
"""The files of a model or an adapter besides its tokenizer; those of an earlier run are removed."""

EVALUATION_DUE = "evaluation_due"
"""In `stateful_callbacks` of trainer_state.json: the evaluation at this step was given up."""


class CheckpointedTrainer(ResumingTrainer):
    """A trainer whose checkpoints are whole at every moment; see `luthier.training.checkpoints.store`."""

    def __init__(self, args: "Seq2SeqTrainingArguments", parts: TrainingParts, **words: Any) -> None:
        super().__init__(args, parts, **words)
        self.watch = NonFiniteWatch(parts.tokenizer, Path(self.output_dir))
        self.unsaved: dict[str, Exception] = {}
        """Files beside the weights that could not be saved the last time, and why."""
        self.not_saved: store.NotSaved | None = None
        """Why there is no checkpoint of the last save; None if there is one."""
        self.best_saved: tuple[Any, Any, Any] = (None, None, None)
        """Metric, step and folder of the best checkpoint before the last evaluation."""
        self._after_step: tuple[RandomState, StageState] | None = None
        """Random numbers and the state of the stage after the last whole step, where a step may be given up."""
        self._sums_after_step: Unlogged | None = None
        self._before_given_up: Unlogged | None = None
        self.superseded = list(parts.superseded)
        self.share = SharedSave()
        """The save that is being made."""
        self.drafts = Path(self.output_dir, gather_object([draft_name("checkpoints")])[0])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_distributed_loading_by_transformers:
            folder, writes = Path(output_dir), self.args.should_save
            split_state.save_optimizer(self.optimizer, self.lr_scheduler, folder, writes=writes)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in transformers, but the weights come first, and stay if anything else cannot be saved (`unsaved`).

        peft does not query the hub for a changed vocabulary of the base model. It need not: a trainable embedding is
        among the adapter's `modules_to_save`.
        """
        folder, writes, base = Path(output_dir or self.output_dir), self.args.should_save, unwrap(self.policy)
        more = {TRAINING_ARGS_NAME: partial(arguments.save, self.args, folder / TRAINING_ARGS_NAME)}
        if self.is_distributed_loading_by_transformers and isinstance(self.model, PeftModel):
            state_dict = gathered(self.model, keeps=writes, only_trained=True)
        with self.share.noting():
            if writes:
                folder.mkdir(parents=True, exist_ok=True)
                save_value_head(folder, self.policy, state_dict)
            if not isinstance(self.model, PeftModel):
                weights = without_value_head(self.policy, state_dict)
                save.save_weights(base, folder, weights, is_writer=writes)
            elif writes:
                save.save_adapter(self.model, folder, state_dict)
                more[BESIDE_ADAPTER] = partial(save_beside_adapter, folder, base.config)
        if writes:
            self.unsaved = save.save_beside_weights(
                self.policy, self.parts.tokenizer, folder, self.parts.processor, more
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes checkpoints and would remove old ones: a folder that holds nothing but a draft."""
        return str(self.drafts)

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        """As `_write_checkpoint`. If the disk of any process fails, all go on without this checkpoint.

        With DeepSpeed and `tp_size` the run ends instead: processes wait for each other between the files of a save.
        """
        begin = time.monotonic()
        try:
            self._write_checkpoint(model, trial)
            self.not_saved = None
            self.stop.note_save(time.monotonic() - begin)
        except store.NotSaved as fault:
            if self.accelerator.num_processes > 1 and not self._may_miss_checkpoints:
                raise
            self.not_saved = fault
            if self.state.best_global_step == self.state.global_step:  # only what is saved can be loaded at the end
                self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self.best_saved
            if self.args.local_process_index == 0:
                remove(self.drafts)
            warn(f"{fault.fault}; training goes on -> free some space before the next save")
        finally:
            self.share = SharedSave()

    @property
    def _may_miss_checkpoints(self) -> bool:
        return not self.is_deepspeed_enabled and not self.is_distributed_loading_by_transformers

    def _write_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        """Write the checkpoint beside, rename it when it is whole, and remove old ones after that."""
        self.watch.require_finite_step(self.state.global_step)
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        self.noted[UNLOGGED] = (self._before_given_up or self.unlogged()).as_json()
        folder = Path(self.output_dir, f"checkpoint-{self.state.global_step}")
        draft, ledger = self.drafts / folder.name, None
        self.share = share = SharedSave(
            partial(store.sentence, folder),
            is_writer=self.args.should_save,
            num_processes=self.accelerator.num_processes,
            goes_on=self._may_miss_checkpoints,
        )
        with store.saving(folder), store.writing(draft, folder, share):
            # Every process writes here: after the writer has made the folder, before it makes the manifest.
            with share.noting():
                draft.mkdir(parents=True, exist_ok=True)
                if self.stage_state and share.is_writer:
                    (draft / STAGE_STATE_FILE).write_text(json.dumps(dict(self.stage_state)))
            if self.parts.reading is not None:
                with share.noting():
                    ledger = self.parts.reading.save(draft, writes=share.is_writer)
            with averaged(self.optimizer), share.noting(), share.noting_in_libraries():
                if self.parts.rollouts is not None:
                    self.parts.rollouts.save(draft, self.state.global_step)
                super()._save_checkpoint(model, trial)
                save.raise_disk_fault(self.unsaved)
                self._note_best(draft)
        self.last_saved = folder
        if self.args.should_save:
            self._finish_checkpoint(folder, ledger)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            remove(self.drafts)

    def _finish_checkpoint(self, folder: Path, ledger: Ledger | None) -> None:
        """What follows once a checkpoint has its name. A fault here does not damage it."""
        try:
            if ledger is not None:
                write_json(Path(self.output_dir, LEDGER_FILE), ledger.to_json())
            self._remove_superseded(folder)
            best = self.state.best_model_checkpoint
            store.rotate(folder, self.args.save_total_limit, Path(best) if best else None)
        except (OSError, RunFailed) as fault:
            warn(f"{folder} is saved; {fault}")

    @property
    def noted(self) -> dict[str, Any]:
        """What trainer_state.json keeps besides the numbers of transformers."""
        noted: Any = self.state.stateful_callbacks
        return noted

    # -- signals ----------------------------------------------------------------------------------

    @cached_property
    def may_give_up_step(self) -> bool:
        """Whether a step that is given up has changed nothing."""
        is_alone = self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled
        return is_alone and self.stop.save_seconds is not None and can_begin_again(self.policy)

    @abstractmethod
    def unlogged(self) -> Unlogged:
        """What has been added up since the last line of the log. All processes ask together."""

    def _maybe_log_save_evaluate(self, *arguments: Any, **more: Any) -> None:
        """As in transformers. An evaluation that a signal ends is made up for when the run is resumed."""
        if self.stop.save_seconds is not None:
            self._after_step = RandomState.now(), self.stage_state
        try:
            super()._maybe_log_save_evaluate(*arguments, **more)
        except GaveUp:
            info(f"the evaluation at step {self.state.global_step} is made up for when the run is resumed")
            self.noted[EVALUATION_DUE] = True
            self.control.should_log = self.control.should_evaluate = False
            self.stop.stop(self.control)
            super()._maybe_log_save_evaluate(*arguments, **more)
        if self.may_give_up_step:
            self._sums_after_step = self.unlogged()

    def _make_up_for_evaluation(self, trial: Any, ignored_keys: list[str] | None) -> None:
        """For a run that resumes after an evaluation that was given up."""
        if not self.noted.pop(EVALUATION_DUE, False):
            return
        metrics = self._evaluate(trial, ignored_keys)
        folder = Path(self.output_dir, f"checkpoint-{self.state.global_step}")
        if self._determine_best_metric(metrics, trial) and folder.is_dir():
            self.state.best_model_checkpoint = str(folder)

    def save_last_step(self) -> None:
        """Save the last whole step, after the one that was running was given up."""
        self.policy.zero_grad(set_to_none=True)
        self.watch.forget()
        if self.parts.reading is not None:
            self.parts.reading.give_back()
        folder = Path(self.output_dir, f"checkpoint-{self.state.global_step}")
        if self._after_step is not None and self.last_saved != folder:
            random_state, self.stage_state = self._after_step
            self._before_given_up = self._sums_after_step
            random_state.restore()
            self._save_checkpoint(self.policy, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.stop.was_interrupted = True
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    # -- the end ----------------------------------------------------------------------------------

    def _note_best(self, draft: Path) -> None:
        """Name the best checkpoint where it will be; transformers looked for it among the drafts."""
        best = Path(self.output_dir, f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best.name == draft.name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(draft / TRAINER_STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: transformers calls this for a draft. `callbacks.upload` uploads what is whole."""

    def save_final(self, outdates: tuple[str, ...] = ()) -> None:
        """Save the weights of the finished run to `output_dir`, replacing earlier ones, and what matches `outdates`.

        Raises `RunFailed` if they do not fit on the disk or are not finite; earlier weights are kept then.
        """
        leave_averaged(self.optimizer)
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        output_dir, best = Path(self.output_dir), self.state.best_model_checkpoint
        with store.saving(output_dir), gathering_whole(self.accelerator):
            if self.args.should_save:
                with save_folder_atomically(output_dir, replaces=MODEL_FILES, outdates=outdates) as folder:
                    self.save_model(str(folder), _internal_call=True)
                self._remove_superseded(output_dir)
                self._remove_surplus(output_dir, Path(best) if best else None)
            else:
                self.save_model(_internal_call=True)
        if self.unsaved:
            raise save.incomplete(output_dir, self.unsaved, str(unwrap(self.policy).name_or_path))

    def _remove_surplus(self, output_dir: Path, best: Path | None) -> None:
        """Checkpoints that are left after a kill between the last save and the removal of the oldest."""
        newest = output_dir / f"checkpoint-{self.state.global_step}"
        if best is not None and self.args.save_total_limit == 1:
            newest, best = best, None
        if self.args.save_total_limit and store.is_whole(newest):
            store.rotate(newest, self.args.save_total_limit, best)

    def _remove_superseded(self, saved: Path) -> None:
        """`saved`: what this run has saved in their place."""
        for path in self.superseded:
            if path != saved:
                (store.remove if path.is_dir() else remove)(path)
        self.superseded = []
