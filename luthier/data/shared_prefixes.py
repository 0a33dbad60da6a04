"""Sequences that begin with the same tokens, in one row that has these tokens once.

    [system, prompt 1, answer 1]  [answer 2 to prompt 1]  [prompt 2, answer]

The tokens of the second sequence attend to those of the first up to its answer, and those of the third to the system
prompt (`luthier.model.attention`), at the positions that they have after these. So every hidden state is what it would
be after tokens of its own. With P tokens in a prompt and A in each of n answers, P + n A tokens are computed in place
of n (P + A). A system prompt is computed once for a batch of conversations.

N tokens of the row, S sequences, K labeled tokens, R runs of tokens at most that a sequence shares.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise, takewhile
from typing import Any

from luthier.data.collate import Features, concatenate_rows, targets_of, weights_of
from luthier.data.rows.columns import IDS, LABELS, WEIGHTS
from luthier.data.rows.labels import IGNORE_INDEX

PER_TOKEN = (IDS.name, LABELS.name, WEIGHTS.name)
MIN_SHARED = 8
"""Fewer tokens are not worth an attention call of their own."""


def concatenate_sharing_prefixes(rows: Sequence[Features], num_parts: int | None = None) -> dict[str, Any]:
    """As `concatenate_rows`, but tokens that several sequences begin with stand in the row once.

    `cu_seq_lens_q` bounds what each sequence has of its own, and `prefixes` (S, 2 R) are the runs of tokens before it:
    where each begins, and how long it is; 0, 0 for none. These are in the order of the row. `num_shared` counts their
    tokens. `targets`, `positions`, `target_rows` and `ends` are in the order of `rows`, or of their samples if rows are
    packed. Two targets that follow the same token have the same position. `num_parts`: of n m sequences, r, m + r,
    2 m + r, ... are the n parts of row r, which share with each other alone; None: all share with all.
    """
    import torch

    samples = [sample for row in rows for sample in _samples_of(row)]
    sequences = [list(sample["input_ids"]) for sample in samples]
    together = len(sequences) if num_parts is None else num_parts
    order, shared = _shared(sequences, together)
    if not any(shared):
        return concatenate_rows(rows)
    ids: list[int] = []
    positions: list[int] = []
    bounds, prefixes = [0], []
    places: dict[int, list[int]] = {}
    """Sequence -> where each of its tokens stands."""
    before: list[int] = []
    for number, num_shared in zip(order, shared, strict=True):
        own = sequences[number][num_shared:]
        before = [*before[:num_shared], *range(len(ids), len(ids) + len(own))]
        places[number] = before
        prefixes.append(_runs(before[:num_shared]))
        positions += range(num_shared, num_shared + len(own))
        ids += own
        bounds.append(len(ids))
    in_order = [places[number] for number in range(len(samples))]
    labels = torch.tensor([label for sample in samples for label in (*sample["labels"][1:], IGNORE_INDEX)])
    lengths = torch.tensor([len(place) for place in in_order])
    found = targets_of(labels, torch.arange(len(samples)).repeat_interleave(lengths), weights_of(samples))
    found["positions"] = torch.tensor([place for places in in_order for place in places])[found["positions"]]
    ends = torch.tensor(bounds, dtype=torch.int32)
    most = max(map(len, prefixes))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "num_shared": sum(shared),
        "prefixes": torch.tensor([runs + [0] * (most - len(runs)) for runs in prefixes], dtype=torch.int32),
        **found,
        "ends": torch.tensor([place[-1] for place in in_order]),
    }


def _shared(sequences: Sequence[list[int]], together: int) -> tuple[list[int], list[int]]:
    """The numbers of the sequences in the order of the row, and how many first tokens each shares with the one before.

    In sorted order, none shares more with any sequence before it. Each keeps at least its last token for itself.
    `together`: so many sequences share with each other.
    """
    num_groups = len(sequences) // together
    groups = [
        sorted(range(first, len(sequences), num_groups), key=sequences.__getitem__) for first in range(num_groups)
    ]
    order, shared = list(chain.from_iterable(groups)), [0] * len(sequences)
    for place in range(1, len(order)):
        if place % together:
            one, other = sequences[order[place - 1]], sequences[order[place]]
            number = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other[:-1], strict=False)))
            shared[place] = number if number >= MIN_SHARED else 0
    return order, shared


def _runs(places: Sequence[int]) -> list[int]:
    """Ascending places as runs of successive ones: first, number, first, number, ..."""
    starts = [n for n in range(len(places)) if not n or places[n] != places[n - 1] + 1]
    return [number for start, end in pairwise([*starts, len(places)]) for number in (places[start], end - start)]


def _samples_of(row: Features) -> Iterator[Features]:
    """The samples of a packed row, or the row itself."""
    if not row.get("sample_lengths"):
        yield row
        return
    for start, end in pairwise(accumulate(row["sample_lengths"], initial=0)):
        yield {name: row[name][start:end] for name in PER_TOKEN if row.get(name)}
