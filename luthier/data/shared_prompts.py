"""Sequences that begin with the same prompt, in one row that has the prompt once.

    [prompt, answer 1] [answer 2] ... [answer n]

The tokens of answer 2 attend to the prompt and to their own answer (`luthier.model.attention`), at the positions that
they have behind the prompt, so every hidden state is what it would be after a prompt of its own. With P tokens in the
prompt and A in each answer, P + n A tokens are computed in place of n (P + A).

N tokens of the row, S sequences, K labeled tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.collate import Features, concatenate_rows, targets_of, weights_of
from luthier.data.rows.labels import IGNORE_INDEX


def concatenate_sharing_prompts(rows: Sequence[Features]) -> dict[str, Any]:
    """As `concatenate_rows`, but each prompt that several rows begin with stands in the row once.

    `cu_seq_lens_q` bounds what each sequence has of its own, and `prefixes` (S, 2) says where the prompt before it
    begins and how long it is; (0, 0) where it has its prompt itself. These are in the order of the row. `targets`,
    `positions`, `target_rows` and `ends` are in the order of `rows`. Two targets that follow the same prompt have the
    same position.
    """
    import torch

    groups = _groups(rows)
    if len(groups) == len(rows):
        return concatenate_rows(rows)
    ids: list[int] = []
    positions: list[int] = []
    bounds, prefixes = [0], []
    places: dict[int, list[int]] = {}
    """Row -> where each of its tokens stands."""
    for prompt, members in groups:
        begin = len(ids)
        for count, member in enumerate(members):
            shared = len(prompt) if count else 0
            own = list(rows[member]["input_ids"])[shared:]
            places[member] = [*range(begin, begin + shared), *range(len(ids), len(ids) + len(own))]
            prefixes.append((begin, shared) if shared else (0, 0))
            positions += range(shared, shared + len(own))
            ids += own
            bounds.append(len(ids))
    in_order = [places[number] for number in range(len(rows))]
    labels = torch.tensor([label for row in rows for label in (*row["labels"][1:], IGNORE_INDEX)])
    lengths = torch.tensor([len(place) for place in in_order])
    found = targets_of(labels, torch.arange(len(rows)).repeat_interleave(lengths), weights_of(rows))
    found["positions"] = torch.tensor([place for places in in_order for place in places])[found["positions"]]
    ends = torch.tensor(bounds, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "prefixes": torch.tensor(prefixes, dtype=torch.int32),
        **found,
        "ends": torch.tensor([place[-1] for place in in_order]),
    }


def _groups(rows: Sequence[Features]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts, and the numbers of the rows that begin with them. A row that shares nothing has no prompt here."""
    groups: dict[tuple[int, ...], list[int]] = {}
    alone: list[tuple[tuple[int, ...], list[int]]] = []
    for number, row in enumerate(rows):
        prompt = _prompt(row)
        if prompt:
            groups.setdefault(prompt, []).append(number)
        else:
            alone.append(((), [number]))
    return [*groups.items(), *alone]


def _prompt(row: Mapping[str, Sequence[Any]]) -> tuple[int, ...]:
    """The tokens before the first target; empty if there is no target, and for a packed row."""
    if row.get("sample_lengths"):
        return ()
    first = next((place for place, label in enumerate(row["labels"]) if place and label != IGNORE_INDEX), 0)
    return tuple(row["input_ids"][:first])
