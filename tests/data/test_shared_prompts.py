"""A prompt that several rows begin with stands in the batch once, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.collate import collate, concatenate_rows, tokens_in
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.shared_prompts import concatenate_sharing_prompts


def row(prompt, answer, **more):
    return {"input_ids": [*prompt, *answer], "labels": [IGNORE_INDEX] * len(prompt) + list(answer), **more}


def test_a_pair_with_one_prompt():
    batch = concatenate_sharing_prompts([row([1, 2, 3], [4, 5]), row([1, 2, 3], [6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 6] and batch["prefixes"].tolist() == [[0, 0], [0, 3]]
    assert batch["targets"].tolist() == [4, 5, 6] and batch["target_rows"].tolist() == [0, 0, 1]
    assert batch["positions"].tolist() == [2, 3, 2], "the first tokens of both answers follow the same token"
    assert batch["ends"].tolist() == [4, 5] and batch["max_length_q"] == 5
    assert tokens_in(batch) == 9


@pytest.mark.parametrize(
    "rows",
    [
        [row([1, 2], [3]), row([1, 4], [3])],
        [row([1, 2], [3]), {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX] * 3}],
        [row([1, 2], [3], sample_lengths=[1, 2]), row([1, 2], [4], sample_lengths=[1, 2])],
        [row([], [1, 2]), row([2], [2])],
    ],
    ids=["other prompts", "no target", "packed", "other first tokens"],
)
def test_what_shares_no_prompt_is_laid_out_as_before(rows):
    found, expected = concatenate_sharing_prompts(rows), concatenate_rows(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])) for key in expected)


def test_the_pairs_of_a_batch_find_each_other():
    """A batch has all chosen answers, then all rejected ones."""
    pairs = [
        {f"{part}_{name}": values for part, one in (("chosen", a), ("rejected", b)) for name, values in one.items()}
        for a, b in ((row([1, 2], [3]), row([1, 2], [4])), (row([5, 6], [7]), row([5, 6], [8])))
    ]
    batch = collate(pairs, concatenate_sharing_prompts)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["targets"].tolist() == [3, 7, 4, 8] and batch["ends"].tolist() == [2, 6, 3, 7]


ROW = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
    st.lists(st.integers(2, 9), min_size=1, max_size=4),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_every_row_can_be_read_back(drawn):
    rows = [row(prompt, answer, weights=[0.5] * len(prompt + answer) if w else []) for prompt, answer, w in drawn]
    found, plain = concatenate_sharing_prompts(rows), concatenate_rows(rows)
    for name in ("targets", "target_rows", "weights"):
        assert (name in found) == (name in plain)
        assert name not in plain or torch.equal(found[name], plain[name])
    ids, positions = found["input_ids"][0], found["position_ids"][0]
    bounds = found["cu_seq_lens_q"].tolist()
    prefixes = found.get("prefixes", torch.zeros(len(rows), 2, dtype=torch.int32)).tolist()
    seen = []
    for start, end, (first, length) in zip(bounds, bounds[1:], prefixes, strict=False):
        places = [*range(first, first + length), *range(start, end)]
        assert positions[places].tolist() == list(range(len(places)))
        seen.append(ids[places].tolist())
    assert sorted(seen) == sorted(one["input_ids"] for one in rows)
    assert [ids[end].item() for end in found["ends"]] == [one["input_ids"][-1] for one in rows]
    before_target = [
        one["input_ids"][i] for one in rows for i in range(len(one["labels"]) - 1) if one["labels"][i + 1] >= 0
    ]
    assert ids[found["positions"]].tolist() == before_target
    assert tokens_in(found) == sum(len(one["input_ids"]) for one in rows)
