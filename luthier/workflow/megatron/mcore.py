"""A training run by Megatron-core, through mcore_adapter: `USE_MCA=1`.

mcore_adapter (https://github.com/alibaba/ROLL, `mcore_adapter/`) has the model in the layers of Megatron-core, a
trainer that is transformers' with Megatron's step in it, and the weights of Hugging Face at both ends. Rows, log,
reports and the folder of the result are luthier's own.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.mcore import SIZES
from luthier.core.errors import MissingExtra
from luthier.core.kinds import STAGES
from luthier.workflow.megatron import (
    block_of,
    describe,
    model_folder,
    named_checkpoint,
    prepared_text,
    require_whole_groups,
    shifted_batch,
)

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.core.machine import Machine
    from luthier.data.prepare import PreparedData
    from luthier.data.rows.table import Table
    from luthier.training.fit import RunResult

INSTALL = 'pip install "git+https://github.com/alibaba/ROLL.git#subdirectory=mcore_adapter"'


def train_with_mcore(run: "TrainRun", machine: "Machine") -> "RunResult":
    """Train and evaluate. The final weights are in the format of Hugging Face, checkpoints in that of Megatron.

    Raises `MissingExtra` if mcore_adapter or Megatron-core cannot be imported, `InvalidInput` for what it refuses.
    """
    from transformers.trainer_callback import PrinterCallback

    from luthier.training.callbacks import callbacks_of
    from luthier.training.fit import RunResult

    resume_from = resume_point(run)
    require_whole_groups(run.mcore, machine.world_size)
    library = _library()
    args = arguments(run, machine, library["Seq2SeqTrainingArguments"])
    stage, output_dir = STAGES.get(run.stage), Path(run.training["output_dir"])
    text, data = prepared_text(run, "USE_MCA")
    # Experts on several devices need batches of one length.
    block = block_of(run.mcore, run.data.cutoff_len, one_length=run.mcore.expert_model_parallel_size > 1)
    folder = model_folder(text.source, "USE_MCA", "mcore_adapter")
    model = library["AutoModel"].from_pretrained(folder, args)
    trainer = library["McaTrainer"](
        model=model,
        args=args,
        tokenizer=text.tokenizer,
        data_collator=partial(shifted_batch, pad_token_id=text.tokenizer.pad_token_id, block=block),
        train_dataset=shuffled(run, data),
        eval_dataset=(data.eval[""] if set(data.eval) == {""} else dict(data.eval)) or None,
        callbacks=callbacks_of(run, stage),
    )
    trainer.remove_callback(PrinterCallback)
    metrics: dict[str, Mapping[str, float]] = {}
    if run.trains:
        metrics["train"] = trainer.train(resume_from_checkpoint=resume_from).metrics
        save_as_hf(trainer)
    if run.training["do_eval"] and data.eval:
        metrics["eval"] = trainer.evaluate()
    if trainer.is_world_process_zero():
        describe(run, trainer, data, metrics)
    return RunResult(output_dir, metrics, trainer.state.log_history)


def _library() -> dict[str, Any]:
    """The three names of mcore_adapter that a run uses. Raises `MissingExtra`."""
    try:
        from mcore_adapter.models import AutoModel
        from mcore_adapter.trainer import McaTrainer
        from mcore_adapter.training_args import Seq2SeqTrainingArguments
    except ImportError as fault:
        raise MissingExtra(
            f"USE_MCA: mcore_adapter cannot be imported here ({fault}) -> {INSTALL}, with megatron-core"
        ) from fault
    return {"AutoModel": AutoModel, "McaTrainer": McaTrainer, "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}


def arguments(run: "TrainRun", machine: "Machine", kind: Any) -> Any:
    """The training arguments of mcore_adapter: those of transformers and the keys of Megatron that the user wrote.

    The sizes are always among them, since the library has no default for them.
    """
    from luthier.training.arguments import training_arguments

    keys = {
        name: value
        for name, value in asdict(run.mcore).items()
        if value is not None and (name in run.given or name in SIZES)
    }
    return training_arguments(run, machine, kind, keys)


def shuffled(run: "TrainRun", data: "PreparedData") -> "Table | None":
    """The training rows in the order of training: mcore_adapter reads them one after the other, in each epoch."""
    import numpy as np

    rows = data.table
    if rows is None or not run.shuffles:
        return rows
    seed = run.training["data_seed"]
    return rows.select(np.random.default_rng(run.training["seed"] if seed is None else seed).permutation(len(rows)))


def save_as_hf(trainer: Any) -> None:
    """The final weights in the format of Hugging Face alone; all processes save together."""
    args = trainer.args
    asked = args.save_hf_model, args.save_only_model
    args.save_hf_model = args.save_only_model = True
    trainer.save_model()
    args.save_hf_model, args.save_only_model = asked


def resume_point(run: "TrainRun") -> str | None:
    """The checkpoint of Megatron to continue: the one that is named, else the last one in `output_dir`, if any.

    Makes `output_dir`. Raises `OutputError` if it cannot be written, or has a model that would be lost.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from luthier.training.checkpoints.store import require_no_weights

    if (named := named_checkpoint(run)) is not None:
        return named
    output_dir = Path(run.training["output_dir"])
    if run.training["overwrite_output_dir"]:
        return None
    found: str | None = get_last_checkpoint(str(output_dir))
    if found is None and run.trains:
        require_no_weights(output_dir)
    return found
