"""How long the sequence is that each token of a batch stands in. B rows, T tokens of a row."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def sequence_lengths(inputs: Mapping[str, Any]) -> "Tensor":
    """(B, T) numbers of tokens, 0 at padding. `inputs`: what a model's `forward` takes (`luthier.data.collate`).

    `cu_seq_lens_q` has the boundaries of sequences concatenated in one row, `attention_mask` marks padding.
    """
    import torch

    ids = inputs["input_ids"]
    bounds, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if bounds is not None:
        lengths = bounds.diff().long()
        return lengths.repeat_interleave(lengths, output_size=ids.shape[1])[None]
    if mask is not None and mask.ndim == 2:
        return mask.long() * mask.long().sum(1, keepdim=True)
    return torch.full_like(ids, ids.shape[1])
