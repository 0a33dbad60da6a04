"""The part of a batch that one process has when several share its tokens: N / P consecutive tokens of the row.

    process 0   t0 t1 t2 t3     process 1   t4 t5 t6 pad      (N = 8 with padding, P = 2)

N tokens of the row, P processes. Targets are chosen before the cut, so the last token of a part predicts the first
token of the next part. Sums over the parts are those of the whole batch.
"""

from collections.abc import Sequence
from typing import Any

from luthier.data.collate import SLICE_START, Features, concatenate_rows


def concatenate_slice(rows: Sequence[Features], part: int, num_parts: int) -> dict[str, Any]:
    """Part `part` of `num_parts` of `concatenate_rows`.

    `input_ids` and `position_ids` (1, N / P), `positions`, `targets`, `target_rows` and `weights` are those of the
    part; `positions` count from its first token. `cu_seq_lens_*`, `max_length_*` and `ends` are those of the row, which
    is padded by a sample of its own to a multiple of P.
    """
    import torch

    row = concatenate_rows(rows)
    num_tokens = row["input_ids"].shape[1]
    num_filled = -num_tokens % num_parts
    if num_filled:
        bounds = torch.cat([row["cu_seq_lens_q"], row["cu_seq_lens_q"][-1:] + num_filled])
        row |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        row |= dict.fromkeys(("max_length_q", "max_length_k"), max(row["max_length_q"], num_filled))
        # Any token will do: no other sample attends to these, and none of them has a target.
        row["input_ids"] = torch.cat([row["input_ids"], row["input_ids"][:, :1].expand(1, num_filled)], 1)
        row["position_ids"] = torch.cat([row["position_ids"], torch.arange(num_filled)[None]], 1)
    length = (num_tokens + num_filled) // num_parts
    start = part * length
    own = (row["positions"] >= start) & (row["positions"] < start + length)
    names = ("positions", "targets", "target_rows", "weights")
    targets: dict[str, Any] = {name: row[name][own] for name in names if name in row}
    return {
        **row,
        **{name: row[name][:, start : start + length].contiguous() for name in ("input_ids", "position_ids")},
        **targets,
        "positions": targets["positions"] - start,
        SLICE_START: start,
    }
