"""Everything that a trainer needs. It is made first, so a trainer is complete when it is constructed."""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env

from luthier.config.keys.recovery import RecoveryConfig
from luthier.data.collate import Layout, collate, pad_rows
from luthier.data.pixels import Pixels
from luthier.data.rows.columns import LABELS, kind_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.rows.table import Table, extended
from luthier.data.sequence_slices import concatenate_slice
from luthier.model.heads.output_head import OutputHead, inspect_head
from luthier.model.media.processor import AS_IT_IS, FittedProcessor
from luthier.model.types import Models
from luthier.stages import Stage
from luthier.training.distributed.sequence_groups import SequenceGroups
from luthier.training.distributed.sums import Collate
from luthier.training.rollouts import Rollouts
from luthier.training.streaming import StreamReading

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from luthier.training.watch.gauges import Gauge

Follow = Callable[[Sized], Callable[[], None]]
"""Items to go through -> what to call after each of them, see `luthier.training.predictions.follow`."""
EvalMetrics = Callable[["nn.Module", str, Follow], Mapping[str, float]]
"""(model, metric prefix, follow) -> metrics besides the loss, such as ROUGE."""
TaskMetrics = Callable[["nn.Module", str, Follow], Mapping[str, float]]
"""(model, metric prefix, follow) -> eval_<task>_<metric> of `eval_tasks`; nothing where the prefix is of another
evaluation."""
BuildOptimizer = Callable[["nn.Module", "TrainingArguments"], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """What a `StageTrainer` needs besides its arguments."""

    stage: Stage
    config: Any
    """The keys of the stage."""
    models: Models
    """The policy, its output head, and the frozen models that the loss compares it with."""
    tokenizer: "PreTrainedTokenizerBase"
    collate: Collate
    has_images: bool = False
    train_rows: Any
    """Rows with a length, or a stream; None if the run does not train."""
    eval_rows: Mapping[str, Any]
    """Name -> rows; a single set has the name ""."""
    shuffle: bool = True
    reading: StreamReading | None = None
    """The state of the stream, if `train_rows` is one."""
    rollouts: Rollouts | None = None
    """Sampled answers that the loss is computed from, if the stage needs them."""
    build_optimizer: BuildOptimizer | None = None
    """None: the optimizer of `optim`."""
    callbacks: "Sequence[TrainerCallback]" = ()
    gauges: "Sequence[Gauge]" = ()
    """Called at each log line."""
    eval_metrics: EvalMetrics | None = None
    """Called after every evaluation."""
    task_metrics: TaskMetrics | None = None
    """Called after every evaluation, if there are `eval_tasks`."""
    superseded: Sequence[Path] = ()
    """Checkpoints and descriptions of an earlier run, removed once this run has saved something."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What follows a step that is not finite, and a signal."""
    groups: SequenceGroups | None = None
    """Processes that share the tokens of a batch; None if each has batches of its own."""
    processor: FittedProcessor = AS_IT_IS
    """Saved with the weights, see `copy_processor`."""


def collator(
    pad_token_id: int,
    concatenated: Layout | None,
    pixels: Pixels | None = None,
    groups: SequenceGroups | None = None,
) -> Collate:
    """`concatenated`: how rows are without padding, if the model does not attend across samples; None: they are padded.
    `pixels`: rows may have images. `groups`: a process gets its part of the tokens."""
    if groups is not None:
        layout: Layout = partial(concatenate_slice, part=groups.part, num_parts=groups.size)
    else:
        layout = layout_of(pad_token_id, concatenated)
    return partial(collate, layout=layout, pixels=pixels)


def layout_of(pad_token_id: int, concatenated: Layout | None) -> Layout:
    return concatenated or partial(pad_rows, pad_token_id=pad_token_id)


def policy_head(policy: "nn.Module", args: "TrainingArguments", moe_aux_loss_coef: float | None) -> OutputHead:
    """The policy's output head. With sharded weights or a compiled forward pass, the model calls the layer itself."""
    head = inspect_head(policy, moe_aux_loss_coef)
    is_sharded = bool(args.fsdp) or args.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return replace(head, linear=None) if is_sharded or args.torch_compile else head


def with_fillers(rows: Table, multiple: int) -> Table:
    """Rows plus filler rows without labels, up to a multiple of `multiple`, so that no row counts twice."""
    num_missing = -len(rows) % multiple
    if not num_missing:
        return rows
    labels = {name: [IGNORE_INDEX] * len(rows[0][name]) for name in rows.column_names if kind_of(name) is LABELS}
    filler = {**rows[0], **labels}
    return extended(rows, [filler] * num_missing)
