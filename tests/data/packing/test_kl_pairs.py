"""The pairs of a prompt and the answer to another one, which kto measures the divergence by."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from luthier.core.errors import DataError
from luthier.data.collate import concatenate_rows, pad_rows, sequences
from luthier.data.packing.kl_pairs import BATCH_ROWS, MismatchedPairs
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.rows.table import Table


def table(pairs: list[tuple[list[int], list[int]]]) -> Table:
    """Rows of (prompt, answer), liked in turns."""
    return Table(
        pa.Table.from_pydict(
            {
                "input_ids": [prompt + answer for prompt, answer in pairs],
                "labels": [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in pairs],
                "kto_tags": [[number % 2] for number in range(len(pairs))],
            }
        )
    )


def joined(pairs: list[tuple[list[int], list[int]]], size_tokens: int = 100) -> dict[str, list[list[int]]]:
    packer = MismatchedPairs(size_tokens)
    columns: dict[str, list[Any]] = {column.name: [] for column in packer.columns}
    for batch in packer.join(table(pairs)):
        for name, array in zip(columns, batch, strict=True):
            columns[name] += array.to_pylist()
    return columns


def mismatched(pairs: list[tuple[list[int], list[int]]], size_tokens: int = 100) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of the part `kl_`."""
    columns = joined(pairs, size_tokens)
    found = []
    for ids, labels in zip(columns["kl_input_ids"], columns["kl_labels"], strict=True):
        start = sum(label == IGNORE_INDEX for label in labels)
        assert labels == [IGNORE_INDEX] * start + ids[start:]
        found.append((ids[:start], ids[start:]))
    return found


P, Q, R = [1], [2, 2], [3, 3, 3]


def test_each_prompt_gets_the_answer_of_the_row_before_it_in_a_circle():
    assert mismatched([(P, [10]), (Q, [20]), (R, [30])]) == [(P, [30]), (Q, [10]), (R, [20])]


def test_an_answer_to_the_same_prompt_is_no_stranger():
    """P 10, P 11, Q 20, Q 21, P 12: the nearest row before with another prompt, and for the first two that is Q 21."""
    pairs = [(P, [10]), (P, [11]), (Q, [20]), (Q, [21]), (P, [12])]
    assert mismatched(pairs) == [(P, [21]), (P, [21]), (Q, [11]), (Q, [11]), (P, [21])]


@pytest.mark.parametrize("num_rows", [2, 5, BATCH_ROWS, BATCH_ROWS + 3])
def test_by_looking_back_one_by_one(num_rows):
    """The same by the definition, row by row; the rows are those of the dataset otherwise."""
    chance = np.random.default_rng(num_rows)
    pairs = [([int(chance.integers(3))], [100 + number]) for number in range(num_rows - 2)] + [([0], [7]), ([1], [8])]
    expected = []
    for number, (prompt, _) in enumerate(pairs):
        back = next(b for b in range(1, num_rows) if pairs[number - b][0] != prompt)
        expected.append((prompt, pairs[number - back][1]))
    assert mismatched(pairs) == expected
    columns, rows = joined(pairs), table(pairs)
    assert all(columns[name] == rows[name][:] for name in ("input_ids", "labels", "kto_tags"))


def test_a_pair_has_a_budget_of_its_own():
    """A prompt of 8 and an answer of 8 within 10 tokens: each gives up in proportion."""
    first, _ = mismatched([([1] * 8, [10]), ([2], [20] * 8)], size_tokens=10)
    assert first == ([1] * 5, [20] * 5)


@pytest.mark.parametrize("pairs", [[(P, [10])], [(P, [10]), (P, [11]), (P, [12])]])
def test_rows_of_one_prompt_have_no_strangers(pairs):
    with pytest.raises(DataError, match=f"all {len(pairs)} rows have the same prompt"):
        joined(pairs)


@pytest.mark.parametrize("layout", [concatenate_rows, lambda rows: pad_rows(rows, 0)], ids=["concatenated", "padded"])
def test_the_sequences_of_a_batch_apart_are_those_of_a_batch_of_their_own(layout):
    rows = [{"input_ids": p + a, "labels": [IGNORE_INDEX] * len(p) + a} for p, a in ((P, [10]), (Q, [4, 5]), (R, [6]))]
    for start, stop in ((0, 1), (1, 3), (0, 3), (2, 3)):
        found, expected = sequences(layout(rows), start, stop), layout(rows[start:stop])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] == value) if isinstance(value, int) else found[name].tolist() == value.tolist(), name
