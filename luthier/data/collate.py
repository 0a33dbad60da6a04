"""From tokenized rows to the tensors of one batch. B sequences, T tokens of the longest, N tokens in total.

A row with two parts is two sequences: the batch has the first parts of all rows, then their second parts.

Causal models predict token t + 1 at position t. The shift is made here, once: `positions` are the positions with a
target and `targets` the token ids, so that no loss shifts labels and no model computes logits that are not used.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.data.rows.columns import numbers_of, part_of, parts_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.shared_media import positions_of, shared_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.pixels import Pixels

FAULT = "fault"
"""The only entry of a batch that a worker process could not make: the error."""
SLICE_START = "slice_start"
"""The entry of a batch that is a part of its row, for one process of several: the first token of the part."""
PAD_MULTIPLE = 8
"""Padded lengths are multiples of this, for the tensor cores."""

Features = Mapping[str, Sequence[Any]]
Layout = Callable[[Sequence[Features]], dict[str, Any]]
"""`concatenate_rows`, `pad_rows`, or `luthier.data.shared_prefixes.concatenate_sharing_prefixes`."""


def collate(rows: Sequence[Mapping[str, Any]], layout: Layout, pixels: "Pixels | None" = None) -> dict[str, Any]:
    """The sequences of all rows in this layout, and one tensor for each column with a number per row.

    `pixels`: makes the inputs of a model that sees or hears; None for rows of text.
    """
    import torch

    parts = parts_of(rows[0])
    sequences = [part_of(row, part) for part in parts for row in rows]
    try:
        batch = layout(sequences) if pixels is None else _with_media(rows, sequences, layout, pixels, len(parts))
    except DataError as fault:
        if torch.utils.data.get_worker_info() is None:
            raise
        return {FAULT: fault}  # torch would make a traceback of it on the way out of the worker process
    for column in numbers_of(rows[0]):
        batch[column] = torch.tensor([row[column] for row in rows]).T.flatten()
    return batch


def require_whole(batches: Sequence[Mapping[str, Any]]) -> None:
    """Raises the error that kept a worker process from making one of these batches."""
    for batch in batches:
        if FAULT in batch:
            raise batch[FAULT]


def _with_media(
    rows: Sequence[Mapping[str, Any]], sequences: Sequence[Features], layout: Layout, pixels: "Pixels", num_parts: int
) -> dict[str, Any]:
    """A batch with the inputs `media` for the items of its rows, which each of its `media_parts` parts needs.

    An item that stands in for one is a sequence after the others that only the model sees: it is none of `ends`, and
    has no target. Each part has its own. Where the model can share them, `media` are those of the distinct samples,
    and `sharing` says which sequence shows which.
    """
    missing = pixels.missing(rows)
    shared = None if missing else pixels.shared(rows, num_parts)
    if shared is not None:
        media, sharing = shared
        batch = layout(sequences)
        batch |= pixels.token_inputs(batch, positions_of(media, sharing))
        return {**batch, "media": media, "media_parts": 1, "sharing": sharing}
    media = pixels.inputs(rows)
    if not media:
        num_parts = 1
    stand_ins = [pixels.stand_in(name) for _ in range(num_parts) for name in missing]
    for name in missing:
        media |= pixels.stand_in_inputs(name)
    batch = layout([*sequences, *stand_ins])
    if stand_ins:
        batch["ends"] = batch["ends"][: -len(stand_ins)]
    batch |= pixels.token_inputs(batch, repeated(media, num_parts))
    return {**batch, "media": media, "media_parts": num_parts} if media else batch


def repeated(media: "Mapping[str, Tensor]", num_parts: int) -> "dict[str, Tensor]":
    """The inputs for the items of all parts. Their first dimension goes from row to row or from item to item."""
    if num_parts == 1:
        return dict(media)
    return {
        name: values.repeat(num_parts, *[1] * (values.dim() - 1)) if values.dim() else values
        for name, values in media.items()
    }


def sequences(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The part of a batch with the sequences from `start` up to `stop`, without the numbers of rows.

    The sequences of the batch share no tokens; of one with media these are whole parts. What stands in for an item
    stays, once for each part.
    """
    import torch

    rows, bounds = batch["target_rows"], batch.get("cu_seq_lens_q")
    num_sequences = batch["ends"].numel()
    numbers = torch.stack([(rows < start).sum(), (rows < stop).sum()])
    # All at once: each time, the host waits for the device.
    first_target, last_target, *places = (numbers if bounds is None else torch.cat([numbers, bounds])).tolist()
    chosen = slice(first_target, last_target)
    media = _media_of(batch, start, stop)
    end = num_sequences + _num_stand_ins(batch) * media.get("media_parts", 1) // batch.get("media_parts", 1)
    if bounds is not None:
        own, others = places[start : stop + 1], places[num_sequences : end + 1]
        own_bounds, first, last = bounds[start : stop + 1], own[0], own[-1]
        longest = max(until - since for part in (own, others) for since, until in pairwise(part))
        names = [name for name in ("input_ids", "position_ids", *TYPE_KEYS) if name in batch]
        inputs = {name: batch[name][..., first:last] for name in names}
        if len(others) > 1:
            more = slice(others[0], others[-1])
            inputs = {name: torch.cat([inputs[name], batch[name][..., more]], -1) for name in names}
            own_bounds = torch.cat([own_bounds, bounds[num_sequences + 1 : end + 1] - others[0] + last])
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), own_bounds - first)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    else:
        first = start * batch["input_ids"].shape[1]
        names = [name for name in ("input_ids", "attention_mask", *TYPE_KEYS) if name in batch]
        inputs = {name: batch[name][start:stop] for name in names}
        if end > num_sequences:
            inputs = {name: torch.cat([inputs[name], batch[name][num_sequences:end]]) for name in names}
    return {
        **inputs,
        **media,
        "positions": batch["positions"][chosen] - first,
        "targets": batch["targets"][chosen],
        "target_rows": rows[chosen] - start,
        "ends": batch["ends"][start:stop] - first,
    }


def _num_stand_ins(batch: Mapping[str, Any]) -> int:
    """The number of sequences that stand in for items."""
    bounds = batch.get("cu_seq_lens_q")
    whole: int = batch["input_ids"].shape[0] if bounds is None else bounds.numel() - 1
    return whole - int(batch["ends"].numel())


def _media_of(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The media of these sequences, which are whole parts of the batch unless they share them."""
    if "media" not in batch:
        return {}
    if "sharing" in batch:
        return {"media": batch["media"], "media_parts": 1, "sharing": batch["sharing"].part(start, stop)}
    num_sequences = stop - start
    num_parts, whole = batch["media_parts"], batch["ends"].numel()
    if num_parts > 1:
        assert num_sequences * num_parts % whole == 0, "the items of a part stay together"
        num_parts = num_sequences * num_parts // whole
    return {"media": batch["media"], "media_parts": num_parts}


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


TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
"""The types of tokens, of text or of media; models call them one or the other."""
MODEL_KEYS = (
    *("input_ids", "attention_mask", "position_ids", *TYPE_KEYS),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "prefixes"),
)
"""The entries of a batch that are inputs of the model; the others are for the loss.

`ends` (B,) are the last tokens of the sequences. `media` are more inputs, under the names of the model."""


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that the model's `forward` takes."""
    inputs = {key: batch[key] for key in MODEL_KEYS if key in batch}
    if "sharing" in batch:
        return inputs | shared_inputs(batch["media"], batch["sharing"])
    return inputs | repeated(batch["media"], batch["media_parts"]) if "media" in batch else inputs


def tokens_in(batch: Mapping[str, Any]) -> int:
    """The number of tokens in the sequences of a batch, without padding. Shared tokens count in each sequence."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    if SLICE_START in batch:  # the padding of the row stands at its end
        left = int(batch["ends"].max()) + 1 - int(batch[SLICE_START])
        return max(0, min(left, batch["input_ids"].numel()))
    return int(batch["input_ids"].numel()) + int(batch.get("num_shared", 0))
