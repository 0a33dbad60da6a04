"""How much a run computes: rows, tokens, steps, and the largest batch of the first epoch.

A micro-batch is what one process computes at a time. P parts of a row, R rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from luthier.config.keys.training import BY_LENGTH
from luthier.data.collate import PAD_MULTIPLE, Layout, concatenate_rows
from luthier.data.rows.arrow import batches_of
from luthier.data.rows.columns import IDS, IMAGES, LABELS, LENGTHS, part_of, parts_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.stages import cached_reference
from luthier.workflow.frozen_models import layout_by_keys
from luthier.workflow.plan.trace import Batch

if TYPE_CHECKING:
    import numpy as np

    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage

NUM_DRAWN_EPOCHS = 64
"""Epochs whose order is drawn to see which rows their last batch leaves out; later ones count as their mean."""
NUM_SAMPLED_ROWS = 256
"""Of a stream, whose length is unknown."""


@dataclass(frozen=True, slots=True)
class Work:
    rows: int | None
    """Training rows; None for a stream."""
    tokens: int
    """In all rows that are trained on, as often as they are."""
    steps: int
    """Of the optimizer."""
    epochs: float
    heaviest: Batch
    """The micro-batch with the most tokens."""
    heaviest_tokens: int
    """Of its rows. A prompt that several of them share counts for each, as in `tokens`."""
    longest_tokens: int
    """Those that the largest batch of one row computes."""
    tokens_per_epoch: int | None
    num_answers: int = 0
    """Answers that are sampled at a time; 0 without rollouts."""
    scored: Batch | None = None
    """The batch with the most tokens that a reference scores before training."""
    evaluated: Batch | None = None
    """The batch with the most tokens of an evaluation during training."""
    heaviest_rows: Sequence[Mapping[str, Any]] = ()
    """Those of `heaviest`, in a run with images."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of every row: tokens and targets of each part, (R, P), and the samples of packed rows."""

    tokens: "np.ndarray"
    targets: "np.ndarray"
    samples: "list[list[int]] | None"


def work_of(run: "TrainRun", stage: "Stage", data: "PreparedData", *, pads: bool, world_size: int = 1) -> Work:
    """`pads`: rows are padded to the longest of a batch. `world_size`: processes, of which those that share tokens or
    layers count once. Raises `ValueError` if the run has no training rows."""
    import numpy as np

    keys, rollout = run.training, stage.rollout(run.method)
    is_streamed = data.streamed is not None
    rows: Any = data.streamed.first(NUM_SAMPLED_ROWS)[0] if data.streamed is not None else data.train
    if rows is None or not len(rows):
        raise ValueError("the run has no training rows")
    lengths = lengths_of(rows)
    if rollout is not None and rollout.sampled_share:
        lengths = _sampled(lengths, run.generating.max_new_tokens or 0, replaces=rollout.sampled_share == 1)
    size, accumulated = keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]
    num_rows = len(rows)
    if rollout is not None:
        of_step = size * accumulated * world_size
        answers = num_rows * rollout.num_generations
        num_rows = max(answers // of_step, 1) * of_step * rollout.num_passes
    num_batches = _num_batches(num_rows, size * world_size, drop_last=keys["dataloader_drop_last"])
    per_epoch = max(math.ceil(num_batches / accumulated), 1)
    steps = keys["max_steps"] if keys["max_steps"] > 0 else math.ceil(keys["num_train_epochs"] * per_epoch)
    epochs = steps / per_epoch
    batches = micro_batches(run, lengths.tokens.sum(1), size, steps * accumulated * world_size)
    if is_streamed or rollout is not None:
        trained_rows = steps * accumulated * size * world_size if is_streamed else epochs * num_rows
        tokens = round(trained_rows * float(lengths.tokens[list(chain.from_iterable(batches))].sum(1).mean()))
    else:
        tokens = trained_tokens(run, lengths.tokens.sum(1), steps, per_epoch, size * world_size)
    parts = slice(stage.num_learned_parts)
    numbers, heaviest = heaviest_of(lengths, batches, parts, pads=pads)
    heaviest_tokens = heaviest.num_tokens
    drawn = np.fromiter(chain.from_iterable(batches), int)
    of_rows = lengths.tokens[drawn][:, parts]
    longest = int(drawn[(of_rows.max(1) if pads else of_rows.sum(1)).argmax()])
    _, alone = heaviest_of(lengths, [[longest]], parts, pads=pads)
    layout = layout_by_keys(run, stage)
    has_images = IMAGES.name in rows[0]
    if layout is not concatenate_rows and rollout is None and not pads and not has_images:
        heaviest = sharing_prefixes([rows[number] for number in numbers], heaviest.num_targets, layout)
        alone = sharing_prefixes([rows[longest]], alone.num_targets, layout)
    sets = [] if rollout is not None or has_images or is_streamed else list(data.eval.values())
    is_scored = not is_streamed and not has_images and cached_reference(stage, run) is not None
    size_of_pass, reads = keys["per_device_eval_batch_size"], partial(_heaviest_pass, layout=layout, pads=pads)
    return Work(
        rows=None if is_streamed else len(rows),
        tokens=tokens,
        steps=steps,
        epochs=epochs,
        heaviest=replace(heaviest, num_parts=run.parallel.sp_size),
        heaviest_tokens=heaviest_tokens,
        longest_tokens=alone.num_tokens,
        tokens_per_epoch=None if is_streamed else int(lengths.tokens.sum()),
        scored=reads([rows, *sets], size_of_pass) if is_scored else None,
        evaluated=reads(sets, size_of_pass) if keys["eval_strategy"] != "no" else None,
        num_answers=0 if rollout is None else size * accumulated * rollout.num_batches,
        heaviest_rows=[rows[number] for number in numbers] if IMAGES.name in rows[0] else (),
    )


def _sampled(lengths: Lengths, new: int, *, replaces: bool) -> Lengths:
    """With an answer of `new` tokens, the most that are sampled, instead of the answer of the dataset, which alone is
    labeled. `replaces` false: some steps train on those of the dataset."""
    import numpy as np

    answers = np.full_like(lengths.targets, new) if replaces else np.maximum(lengths.targets, new)
    return Lengths(lengths.tokens - lengths.targets + answers, np.maximum(answers, 1), None)


def lengths_of(rows: Any) -> Lengths:
    import numpy as np

    if not hasattr(rows, "select_columns"):
        parts = parts_of(rows[0])
        table = np.array([[len(row[part + IDS.name]) for part in parts] for row in rows])
        counted = [[sum(n != IGNORE_INDEX for n in row[part + LABELS.name][1:]) for part in parts] for row in rows]
        samples = [list(row[LENGTHS.name]) for row in rows] if LENGTHS.name in rows[0] else None
        return Lengths(table, np.array(counted), samples)
    parts = parts_of(rows.column_names)
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for part in parts:
        num_tokens, num_targets = [], []
        for values, lengths in batches_of(rows, part + LABELS.name):
            starts = np.cumsum(lengths) - lengths
            counts = np.concatenate([[0], np.cumsum(values != IGNORE_INDEX)])
            firsts = values[starts[lengths > 0]] != IGNORE_INDEX
            found = counts[starts + lengths] - counts[starts]
            found[lengths > 0] -= firsts
            num_tokens.append(lengths)
            num_targets.append(found)
        tokens.append(np.concatenate(num_tokens))
        targets.append(np.concatenate(num_targets))
    samples = None
    if LENGTHS.name in rows.column_names:
        pieces = (np.split(values, np.cumsum(lengths)[:-1]) for values, lengths in batches_of(rows, LENGTHS.name))
        samples = [piece.tolist() for piece in chain.from_iterable(pieces)]
    return Lengths(np.stack(tokens, 1), np.stack(targets, 1), samples)


def _num_batches(num_rows: int, size: int, *, drop_last: bool) -> int:
    return num_rows // size if drop_last else math.ceil(num_rows / size)


def trained_tokens(run: "TrainRun", lengths: "np.ndarray", steps: int, per_epoch: int, size: int) -> int:
    """In the rows of all steps. `lengths`: (R,) tokens of each row; `size`: rows that all processes read at a time.

    The last epoch may end before it has seen all rows, and those may be longer or shorter than the others.
    """
    num_whole, rest = divmod(steps, per_epoch)
    num_read = len(lengths) // size * size if run.training["dataloader_drop_last"] else len(lengths)
    last = min(rest * run.training["gradient_accumulation_steps"] * size, num_read)

    def read(epoch: int, count: int) -> int:
        return int(lengths[row_order(run, len(lengths), epoch)[:count]].sum())

    if num_read == len(lengths):
        return num_whole * int(lengths.sum()) + read(num_whole, last)
    num_drawn = min(num_whole, NUM_DRAWN_EPOCHS)
    drawn = sum(read(epoch, num_read) for epoch in range(num_drawn))
    return drawn * num_whole // max(num_drawn, 1) + read(num_whole, last)


def row_order(run: "TrainRun", num_rows: int, epoch: int) -> "np.ndarray":
    """(R,) row numbers in the order that an epoch reads them in. The trainer draws that of rows sorted by length."""
    import numpy as np
    import torch

    if not run.shuffles:
        return np.arange(num_rows)
    # As accelerate's SeedableRandomSampler.
    seed = run.training["data_seed"]
    generator = torch.Generator().manual_seed((run.training["seed"] if seed is None else seed) + epoch)
    return torch.randperm(num_rows, generator=generator).numpy()


def micro_batches(run: "TrainRun", lengths: "np.ndarray", size: int, most: int) -> "list[list[int]]":
    """Row numbers of the micro-batches, at most `most`, in the order that the trainer draws them in. `lengths`: (R,)
    tokens of each row; of rows that are put together by length, the longest may come first."""
    found: list[list[int]] = []
    for epoch in range(2):  # later epochs bring no other sizes
        sorts = run.training["train_sampling_strategy"] in BY_LENGTH
        order = ((-lengths).argsort() if sorts else row_order(run, len(lengths), epoch)).tolist()
        found += [order[start : start + size] for start in range(0, len(lengths), size)]
        if len(found) >= most:
            break
    return found[:most]


def heaviest_of(lengths: Lengths, batches: "list[list[int]]", parts: slice, *, pads: bool) -> "tuple[list[int], Batch]":
    """The numbers of its rows, and its size."""
    tokens, targets = lengths.tokens[:, parts], lengths.targets[:, parts]

    def load(rows: list[int]) -> int:
        if pads:
            return int(tokens[rows].max()) * tokens.shape[1] * len(rows)
        return int(tokens[rows].sum())

    rows = max(batches, key=load)
    num_targets = max(int(targets[rows].sum()), 1)
    if pads:
        width = math.ceil(int(tokens[rows].max()) / PAD_MULTIPLE) * PAD_MULTIPLE
        return rows, Batch((width,) * (len(rows) * tokens.shape[1]), num_targets, is_padded=True)
    if lengths.samples is not None:
        return rows, Batch(tuple(chain.from_iterable(lengths.samples[row] for row in rows)), num_targets)
    return rows, Batch(tuple(int(n) for n in tokens[rows].T.flatten()), num_targets)


def _heaviest_pass(sets: "Sequence[Any]", size: int, *, layout: Layout, pads: bool) -> Batch | None:
    """The batch with the most tokens of these sets of rows, read in their order and with all parts of a row at once."""
    found: list[Batch] = []
    for rows in sets:
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        if batches:
            numbers, batch = heaviest_of(lengths_of(rows), batches, slice(None), pads=pads)
            shares = layout is not concatenate_rows and not pads
            found.append(sharing_prefixes([rows[n] for n in numbers], batch.num_targets, layout) if shares else batch)
    return max(found, key=lambda batch: batch.num_tokens, default=None)


def sharing_prefixes(rows: "list[Any]", num_targets: int, layout: Layout) -> Batch:
    """The batch in which tokens that several sequences begin with stand once."""
    batch = layout([part_of(row, part) for part in parts_of(rows[0]) for row in rows])
    lengths = tuple(batch["cu_seq_lens_q"].diff().tolist())
    prefixes = tuple(map(tuple, batch["prefixes"].tolist())) if "prefixes" in batch else None
    return Batch(lengths, num_targets, prefixes=prefixes)
