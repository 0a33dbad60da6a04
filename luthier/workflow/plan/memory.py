"""The most memory that a process of a run holds, part by part.

    loading     libraries + weights + what of the files is mapped meanwhile
    scoring     libraries + weights + reference model + what a pass without gradients takes
    a step      libraries + weights + optimizer + frozen models + (activations, logits and gradients at their worst,
                or gradients and what the step of one of Luthier's own optimizers needs)

The parts are each at its own worst, which is not at the same moment: activations are gone when the last gradient is
there. So the peak is below their sum.

On a CPU the process is all there is, and this was compared with measured runs (benchmarks/bench_plan.py). The C library
keeps some of what was freed: from a fiftieth to two fifths more than is in use; a tenth is taken for it, and a
third in a run with images. On an accelerator it is the memory of PyTorch's allocator, which is taken to keep a
twentieth more than is in use. The context of CUDA is counted on a machine that is not here only: on this one it is
there before the free memory is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import ADAPTERS
from luthier.workflow.plan.shape import holds_format, num_file_bytes, num_weight_bytes
from luthier.workflow.plan.states import states_bytes
from luthier.workflow.plan.trace import Trace
from luthier.workflow.plan.update import Update

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.core.machine import Machine
    from luthier.stages import Stage
    from luthier.workflow.plan.shape import Shape
    from luthier.workflow.plan.work import Work
    from luthier.workflow.text import TextSide

CONTEXT_BYTES = 600 * 10**6
"""Of CUDA with the libraries that PyTorch loads into it."""
ALLOCATOR_SHARE = 0.05
"""What the caching allocator of an accelerator holds beyond what is in use: a tenth on an H200 where rows differ in
length, and next to nothing where they are packed to one length."""
HEAP_SHARE, SEEING_HEAP_SHARE = 0.1, 1 / 4
"""What the C library holds beyond what is in use, and in a run with images, whose pixels and encoder leave gaps."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is in memory at every step, whatever the batch."""

    libraries_bytes: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Its states."""
    frozen_bytes: int
    cache_bytes: int
    loading_bytes: int
    """More than weights and libraries, while the weights are read."""
    scoring_bytes: int = 0
    """While a reference scores the rows before training: a model of its own, and the largest batch."""
    evaluating_bytes: int = 0
    """Of the largest batch of an evaluation."""
    mapped_bytes: int = 0
    """Of the files, as long as the model exists."""
    updating_bytes: int = 0
    """What a step of the optimizer needs beside gradients and states."""
    margin_share: float = 0.0
    gathered_bytes: int = 0
    """Weights of other processes, while a layer computes."""
    buckets_bytes: int = 0
    """Gradients on their way between processes."""
    traces_gradients: bool = True
    """Whether a trace of the step holds the gradients. Where they are sharded, it does not."""
    host_bytes: int = 0
    """In the memory of the host beside an accelerator: while the weights are loaded, or what is offloaded to it."""

    @property
    def all_bytes(self) -> int:
        """Without the gradients that a trace of the step holds."""
        weights = self.weights_bytes + self.frozen_bytes + self.mapped_bytes + self.gathered_bytes
        gradients = self.buckets_bytes + (0 if self.traces_gradients else self.gradients_bytes)
        return self.libraries_bytes + weights + self.optimizer_bytes + gradients

    @property
    def least_bytes(self) -> int:
        """What no setting of batch, length or checkpointing changes."""
        return self.all_bytes + (self.gradients_bytes if self.traces_gradients else 0)

    def peak_bytes(self, trace: Trace) -> int:
        loading = self.libraries_bytes + self.weights_bytes + self.loading_bytes
        scoring = self.libraries_bytes + self.weights_bytes + self.mapped_bytes + self.scoring_bytes
        step = max(self.all_bytes + trace.peak_bytes, self.least_bytes + self.updating_bytes)
        between = self.all_bytes + max(self.cache_bytes, self.evaluating_bytes)
        return round(max(loading, scoring, step, between) * (1 + self.margin_share))

    def parts(self, trace: Trace) -> Mapping[str, int]:
        """Name -> bytes, each at its own worst."""
        activations = trace.early_bytes - trace.logits_bytes
        return {
            "libraries": self.libraries_bytes,
            "loader": self.loading_bytes + self.mapped_bytes,
            "weights": self.weights_bytes,
            "gathered_weights": self.gathered_bytes,
            "gradients": self.gradients_bytes,
            "gradients_on_their_way": self.buckets_bytes,
            "optimizer": self.optimizer_bytes,
            "update": self.updating_bytes,
            "frozen_models": self.frozen_bytes,
            "activations": max(activations, 0),
            "logits": trace.logits_bytes,
            "cache": self.cache_bytes,
            "scoring": self.scoring_bytes,
            "evaluation": self.evaluating_bytes,
        }


def held_by(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    shape: "Shape",
    work: "Work",
    machine: "Machine",
    libraries_bytes: int,
) -> Held:
    """`libraries_bytes`: what this process holds before the weights are loaded."""
    trained = trained_bytes(shape)
    on_device = machine.device != "cpu"
    weights = num_weight_bytes(run, shape)
    files = num_file_bytes(text.source)
    is_mapped = files > 0 and holds_format(text.source, str(shape.dtype).removeprefix("torch."))
    full = sum(weight.numel() * shape.dtype.itemsize for weight in shape.model.parameters()) if shape.low_bit else 0
    mapped = 0
    if on_device:
        files = full = 0
    elif is_mapped:
        # Weights in the format of the files are the files themselves, mapped. What stays unquantized keeps the mapping.
        files, mapped = 0, files if shape.low_bit else 0
    return Held(
        libraries_bytes=(CONTEXT_BYTES if machine.is_assumed else 0) if on_device else libraries_bytes,
        weights_bytes=weights,
        gradients_bytes=trained,
        optimizer_bytes=states_bytes(run.training["optim"], shape.model),
        frozen_bytes=frozen_bytes(run, stage, weights, trained),
        cache_bytes=cache_bytes(shape, work),
        loading_bytes=files + (full if text.source.files.gguf_file else 0),
        mapped_bytes=mapped,
        margin_share=ALLOCATOR_SHARE if on_device else SEEING_HEAP_SHARE if work.heaviest_rows else HEAP_SHARE,
    )


def with_updates(held: Held, updates: Sequence[Update]) -> Held:
    """With one of Luthier's own optimizers; () for one of `optim`."""
    if not updates:
        return held
    return replace(
        held,
        optimizer_bytes=max(update.states_bytes for update in updates),
        gradients_bytes=max(update.gradients_bytes for update in updates),
        updating_bytes=max(update.more_bytes for update in updates),
    )


def trained_bytes(shape: "Shape") -> int:
    return sum(weight.nbytes for weight in shape.model.parameters() if weight.requires_grad)


def frozen_bytes(run: "TrainRun", stage: "Stage", weights: int, trained: int) -> int:
    """Of models that the loss runs at each step. One that no key names is the policy as training began, of which the
    trained weights are kept; the size of another is taken for that of the policy."""
    total = 0
    for spec in stage.frozen_models(run):
        if not spec.is_cached:
            total += trained if spec.source is None else weights
    return total


def cache_bytes(shape: "Shape", work: "Work") -> int:
    """Keys and values of the answers that are sampled at a time, and the longest row for each."""
    if not work.num_answers:
        return 0
    config: Any = shape.model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * shape.num_layers * heads * size * shape.dtype.itemsize
    return int(per_token * max(work.heaviest.lengths) * work.num_answers)


def checkpoint_bytes(run: "TrainRun", shape: "Shape", held: Held, num_steps: int) -> tuple[int, int]:
    """(what one checkpoint takes on disk, what all that are kept take with the final weights)."""
    adds = ADAPTERS.get(run.finetuning_type).adds_weights
    weights = held.gradients_bytes if adds else held.weights_bytes
    one = weights if run.training["save_only_model"] else weights + held.optimizer_bytes
    return one, one * num_checkpoints(run, num_steps) + weights


def num_checkpoints(run: "TrainRun", num_steps: int) -> int:
    """That are in the output folder at the end."""
    keys = run.training
    if keys["save_strategy"] == "no":
        return 0
    every = keys["save_steps"]
    by_step = num_steps // every if every >= 1 else round(1 / every)
    made = round(keys["num_train_epochs"]) if keys["save_strategy"] == "epoch" else by_step + (num_steps % every > 0)
    limit = keys["save_total_limit"]
    return max(1, min(int(made), limit or int(made)))
