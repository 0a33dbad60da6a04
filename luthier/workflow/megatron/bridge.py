"""A training run by Megatron-core, through Megatron-Bridge: `USE_MEGATRON_BRIDGE=1`.

Megatron-Bridge (https://github.com/NVIDIA-NeMo/Megatron-Bridge) reads weights of Hugging Face into the layers of
Megatron-core, trains them in a loop of its own, and writes them back. Rows, log, reports and the folder of the result
are luthier's own.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.bridge import under_bridge
from luthier.core.errors import InvalidInput, MissingExtra, ModelError, RunFailed
from luthier.core.kinds import STAGES
from luthier.workflow.megatron import describe, model_folder, named_checkpoint, prepared_text, require_whole_groups
from luthier.workflow.megatron.bridge_config import CHECKPOINTS, configuration, padded_block
from luthier.workflow.megatron.mcore import train_with_mcore

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.core.machine import Machine
    from luthier.data.prepare import PreparedData
    from luthier.training.fit import RunResult
    from luthier.workflow.text import TextSide

INSTALL = "pip install --no-build-isolation 'megatron-bridge>=0.6', or use the NeMo container"
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")
"""Either says that a folder holds checkpoints of Megatron-Bridge."""
_REFUSALS = (AssertionError, ValueError, FileNotFoundError, NotImplementedError)
"""What the library raises for a setting, a model or a checkpoint that it does not take."""


def train_with_megatron(run: "TrainRun", machine: "Machine") -> "RunResult":
    """Train with Megatron-core, through the library that the environment asks for."""
    return train_with_bridge(run, machine) if under_bridge(run) else train_with_mcore(run, machine)


def train_with_bridge(run: "TrainRun", machine: "Machine") -> "RunResult":
    """Train and evaluate. The final weights are in the format of Hugging Face, checkpoints in that of Megatron.

    Raises `MissingExtra` if Megatron-Bridge cannot be imported, `InvalidInput` for what it refuses before it begins,
    `RunFailed` for what it refuses later.
    """
    from luthier.training.arguments import training_arguments
    from luthier.training.callbacks import callbacks_of
    from luthier.training.fit import RunResult
    from luthier.workflow.megatron.bridge_log import BridgeLog

    continued = checkpoints_to_continue(run)
    require_whole_groups(run.bridge, machine.world_size)
    library = _library()
    args = training_arguments(run, machine)
    stage, output_dir = STAGES.get(run.stage), Path(run.training["output_dir"])
    text, data = prepared_text(run, "USE_MEGATRON_BRIDGE")
    rows = data.table
    if rows is None:
        raise InvalidInput("USE_MEGATRON_BRIDGE: there are no rows to train on -> name a dataset")
    folder = model_folder(text.source, "USE_MEGATRON_BRIDGE", "Megatron-Bridge")
    bridge = _read_model(run, library["AutoBridge"], folder)
    config = configuration(run, args, library, bridge, folder, len(rows), len(data.eval.get("", ())))
    config.checkpoint.load = continued
    _give_rows(run, config, library["DatasetProvider"], data, text)

    steps, batch_size = config.train.train_iters, config.train.global_batch_size
    save = partial(save_as_hf, bridge=bridge, config=config, run=run)
    log = BridgeLog(args, callbacks_of(run, stage), steps, batch_size, len(rows), save)
    log.register(manager := library["CallbackManager"]())
    try:
        library["finetune"](config, library["forward_step"], callbacks=manager)
    except _REFUSALS as fault:
        raise RunFailed(f"USE_MEGATRON_BRIDGE: Megatron-Bridge ended the run: {fault}") from fault
    finally:
        log.close()
    if args.process_index == 0:
        text.tokenizer.save_pretrained(output_dir)
        describe(run, log, data, log.metrics)
    return RunResult(output_dir, log.metrics, log.state.log_history)


def _library() -> dict[str, Any]:
    """The names of Megatron-Bridge that a run uses. Raises `MissingExtra`, also for a version that is too old."""
    try:
        from megatron.bridge import AutoBridge
        from megatron.bridge.peft.lora import LoRA
        from megatron.bridge.training import config
        from megatron.bridge.training.callbacks import CallbackManager
        from megatron.bridge.training.finetune import finetune
        from megatron.bridge.training.gpt_step import forward_step
        from megatron.bridge.training.tokenizers.config import TokenizerConfig
    except ImportError as fault:
        raise MissingExtra(
            f"USE_MEGATRON_BRIDGE: Megatron-Bridge cannot be imported here ({fault}) -> {INSTALL}"
        ) from fault
    if not hasattr(config.CheckpointConfig, "hf_source_path"):
        raise MissingExtra(
            f"USE_MEGATRON_BRIDGE: this Megatron-Bridge cannot start from a folder of Hugging Face -> {INSTALL}"
        )
    names = (
        *("ConfigContainer", "TrainingConfig", "ValidationConfig", "OptimizerConfig", "SchedulerConfig"),
        *("DistributedDataParallelConfig", "LoggerConfig", "CheckpointConfig", "RNGConfig", "DatasetProvider"),
    )
    return {
        "AutoBridge": AutoBridge,
        "CallbackManager": CallbackManager,
        "LoRA": LoRA,
        "TokenizerConfig": TokenizerConfig,
        "finetune": finetune,
        "forward_step": forward_step,
        **{name: getattr(config, name) for name in names},
    }


def _read_model(run: "TrainRun", kind: Any, folder: str) -> Any:
    """The AutoBridge of the model. Raises `ModelError` if it has none."""
    try:
        return kind.from_hf_pretrained(folder, trust_remote_code=run.model.trust_remote_code)
    except _REFUSALS as fault:
        raise ModelError(f"{folder}: Megatron-Bridge cannot read it ({fault}) -> unset USE_MEGATRON_BRIDGE") from fault


def save_as_hf(model: Any, *, bridge: Any, config: Any, run: "TrainRun") -> None:
    """The final weights, or the adapter, in the format of Hugging Face; all processes save together."""
    output_dir = run.training["output_dir"]
    if config.peft is None:
        bridge.save_hf_pretrained(model, output_dir, show_progress=False)
        return
    name = run.model.model_name_or_path
    bridge.save_hf_adapter(model, output_dir, config.peft, base_model_name_or_path=name, show_progress=False)


def _give_rows(run: "TrainRun", config: Any, base: Any, data: "PreparedData", text: "TextSide") -> None:
    """Sets `config.dataset`: the rows of luthier, as a provider of Megatron-Bridge (of the class `base`)."""
    from luthier.workflow.megatron.bridge_rows import EvaluationRows, TrainingRows

    rows = data.table
    assert rows is not None, "there is something to train on"
    padding: dict[str, Any] = {"pad_token_id": text.tokenizer.pad_token_id, "block": padded_block(run)}
    seed = run.training["seed"] if run.training["data_seed"] is None else run.training["data_seed"]
    order = seed if run.shuffles else None

    def build_datasets(self: Any, context: Any) -> tuple[Any, Any, None]:
        # One batch more than all steps take, and one evaluation: the sampler refuses a run that has had all its rows.
        length = context.train_samples + config.train.global_batch_size
        train = TrainingRows(rows, length, order, **padding)
        if not config.validation.eval_iters:
            return train, None, None
        each = config.validation.eval_iters * config.validation.eval_global_batch_size
        return train, EvaluationRows(data.eval[""], each, max(context.valid_samples, each) + each, **padding), None

    workers = run.training["dataloader_num_workers"]
    members = {"build_datasets": build_datasets, "seq_length": config.model.seq_length, "__module__": __name__}
    provider = type("RowsOfLuthier", (base,), members)
    config.dataset = provider(
        dataloader_type="single",
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=run.training["dataloader_pin_memory"],
    )


def checkpoints_to_continue(run: "TrainRun") -> str | None:
    """The folder of checkpoints to continue from: the one that is named, else that of this run, if it has any.

    Makes `output_dir`. Raises `OutputError` if it cannot be written, or has a model or checkpoints that would be lost.
    """
    from luthier.core.errors import OutputError
    from luthier.training.checkpoints.store import require_no_weights

    if (named := named_checkpoint(run)) is not None:
        return named
    output_dir = Path(run.training["output_dir"])
    own = output_dir / CHECKPOINTS
    if any((own / name).is_file() for name in TRACKERS):
        if run.training["overwrite_output_dir"]:
            raise OutputError(
                f"overwrite_output_dir: {own} holds the checkpoints of an earlier run, and Megatron-Bridge would mix"
                " them with new ones -> delete that folder, or leave overwrite_output_dir out to continue it"
            )
        return str(own)
    if not run.training["overwrite_output_dir"]:
        require_no_weights(output_dir)
    return None
