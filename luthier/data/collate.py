"""From tokenized rows to the tensors of one batch. B sequences, T tokens of the longest, N tokens in total.

A row with two parts is two sequences: the batch has the first parts of all rows, then their second parts.

Causal models predict token t + 1 at position t. The shift is made here, once: `positions` are the positions with a
target and `targets` the token ids, so that no loss shifts labels and no model computes logits that are not used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.rows.columns import numbers_of, part_of, parts_of
from luthier.data.rows.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

PAD_MULTIPLE = 8
"""Padded lengths are multiples of this, for the tensor cores."""

Features = Mapping[str, Sequence[Any]]
Layout = Callable[[Sequence[Features]], dict[str, Any]]
"""`concatenate_rows`, `pad_rows`, or `luthier.data.shared_prompts.concatenate_sharing_prompts`."""


def collate(rows: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, Any]:
    """The sequences of all rows in this layout, and one tensor for each column with a number per row."""
    import torch

    batch = layout([part_of(row, part) for part in parts_of(rows[0]) for row in rows])
    for column in numbers_of(rows[0]):
        batch[column] = torch.tensor([row[column] for row in rows]).T.flatten()
    return batch


def sequences(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The part of a batch with the sequences from `start` up to `stop`, without the numbers of rows."""
    rows = batch["target_rows"]
    chosen = (rows >= start) & (rows < stop)
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"][start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        longest = int(bounds.diff().max())
        inputs = {name: batch[name][:, first:last] for name in ("input_ids", "position_ids")}
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds - first)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    else:
        first = start * batch["input_ids"].shape[1]
        inputs = {name: batch[name][start:stop] for name in ("input_ids", "attention_mask")}
    return {
        **inputs,
        "positions": batch["positions"][chosen] - first,
        "targets": batch["targets"][chosen],
        "target_rows": rows[chosen] - start,
        "ends": batch["ends"][start:stop] - first,
    }


def concatenate_rows(rows: Sequence[Features]) -> dict[str, Any]:
    """All rows concatenated without padding to a single row of N tokens; positions and attention restart at each.

    A packed row counts as many rows as it has samples (`sample_lengths`); the first label of each is ignored already.

    The keys are those that transformers' attention functions take for rows of different lengths (`cu_seq_lens_*`,
    `max_length_*`): no computation is spent on padding.
    """
    import torch

    lengths = [length for row in rows for length in row.get("sample_lengths") or [len(row["input_ids"])]]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    labels = torch.tensor([label for row in rows for label in (*row["labels"][1:], IGNORE_INDEX)])
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        **targets_of(labels, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), weights_of(rows)),
        "ends": bounds[1:].long() - 1,
    }


def pad_rows(rows: Sequence[Features], pad_token_id: int, *, side: str = "right") -> dict[str, Any]:
    """Rows as a (B, T) rectangle with an attention mask; T is a multiple of 8."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE

    def rectangle(sequences: list[list[int]], filler: int) -> "Tensor":
        spaces = [[filler] * (width - len(sequence)) for sequence in sequences]
        pairs = zip(sequences, spaces, strict=True)
        return torch.tensor([[*s, *fill] if side == "right" else [*fill, *s] for s, fill in pairs])

    ids = [list(row["input_ids"]) for row in rows]
    labels = rectangle([[*row["labels"][1:], IGNORE_INDEX] for row in rows], IGNORE_INDEX)
    return {
        "input_ids": rectangle(ids, pad_token_id),
        "attention_mask": rectangle([[1] * len(row) for row in ids], 0),
        **targets_of(labels.flatten(), torch.arange(len(rows)).repeat_interleave(width), weights_of(rows)),
        "ends": torch.tensor(
            [row * width + (len(sequence) if side == "right" else width) - 1 for row, sequence in enumerate(ids)]
        ),
    }


def targets_of(next_labels: "Tensor", row_of_position: "Tensor", weights: "list[float] | None") -> dict[str, "Tensor"]:
    """next_labels: for each flattened position, the label of the token after it.

    `positions` (K,) are the flattened positions whose next token is a target, `targets` (K,) these tokens,
    `target_rows` (K,) the sequences they belong to, and `weights` (K,) their weights in the loss, unless all are 1.
    """
    import torch

    positions = (next_labels != IGNORE_INDEX).nonzero().squeeze(-1)
    found = {"positions": positions, "targets": next_labels[positions], "target_rows": row_of_position[positions]}
    return found if weights is None else found | {"weights": torch.tensor(weights)}


def weights_of(rows: Sequence[Features]) -> list[float] | None:
    """The weight of each target in the loss; None if all are 1."""
    if not any(row.get("weights") for row in rows):
        return None
    return [
        weight
        for row in rows
        for label, weight in zip(row["labels"][1:], (row.get("weights") or [1.0] * len(row["labels"]))[1:], strict=True)
        if label != IGNORE_INDEX
    ]


MODEL_KEYS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "prefixes"),
)
"""The entries of a batch that are inputs of the model; the others are for the loss.

`ends` (B,) are the last tokens of the sequences."""


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that the model's `forward` takes."""
    return {key: batch[key] for key in MODEL_KEYS if key in batch}


def tokens_in(batch: Mapping[str, Any]) -> int:
    """The number of tokens in the sequences of a batch, without padding. A shared prompt counts in each of them."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    return int(batch["input_ids"].numel() + (batch["prefixes"][:, 1].sum() if "prefixes" in batch else 0))
