"""Tokens that several rows begin with stand in the batch once, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data import shared_prefixes
from luthier.data.collate import collate, concatenate_rows, tokens_in
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.shared_prefixes import concatenate_sharing_prefixes


def row(prompt, answer, **more):
    return {"input_ids": [*prompt, *answer], "labels": [IGNORE_INDEX] * len(prompt) + list(answer), **more}


@pytest.fixture(autouse=True)
def shares_single_tokens(monkeypatch):
    monkeypatch.setattr(shared_prefixes, "MIN_SHARED", 1)


def test_a_pair_with_one_prompt():
    batch = concatenate_sharing_prefixes([row([1, 2, 3], [4, 5]), row([1, 2, 3], [6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 6] and batch["prefixes"].tolist() == [[0, 0], [0, 3]]
    assert batch["targets"].tolist() == [4, 5, 6] and batch["target_rows"].tolist() == [0, 0, 1]
    assert batch["positions"].tolist() == [2, 3, 2], "the first tokens of both answers follow the same token"
    assert batch["ends"].tolist() == [4, 5] and batch["max_length_q"] == 5
    assert tokens_in(batch) == 9


def test_a_system_prompt_before_prompts_that_have_two_answers_each():
    """Rows in any order; the prefix of the last answer stands in two runs."""
    rows = [row([1, 2, 5], [7]), row([1, 2, 3, 4], [6]), row([1, 2, 5], [8])]
    batch = concatenate_sharing_prefixes(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 5, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7, 8]
    assert batch["prefixes"].tolist() == [[0, 0, 0, 0], [0, 2, 0, 0], [0, 2, 5, 1]]
    assert batch["targets"].tolist() == [7, 6, 8] and batch["positions"].tolist() == [5, 3, 5]
    assert batch["ends"].tolist() == [6, 4, 7] and tokens_in(batch) == 13


def test_answers_that_begin_alike_and_equal_rows():
    """The last token of a row is always its own."""
    batch = concatenate_sharing_prefixes([row([1], [2, 3]), row([1], [2, 4]), row([1], [2, 3])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 3, 4]]
    assert batch["prefixes"].tolist() == [[0, 0], [0, 2], [0, 2]] and batch["ends"].tolist() == [2, 4, 3]
    assert batch["targets"].tolist() == [2, 3, 2, 4, 2, 3] and batch["positions"].tolist() == [0, 1, 0, 1, 0, 1]


def test_samples_of_packed_rows_share_too():
    packed = {"input_ids": [1, 2, 3, 1, 2, 4], "labels": [-100, -100, 3, -100, 2, 4], "sample_lengths": [3, 3]}
    batch = concatenate_sharing_prefixes([packed, row([1, 2], [5])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["targets"].tolist() == [3, 2, 4, 5] and batch["target_rows"].tolist() == [0, 1, 1, 2]
    assert batch["positions"].tolist() == [1, 0, 1, 1]


def test_few_tokens_are_not_shared(monkeypatch):
    monkeypatch.setattr(shared_prefixes, "MIN_SHARED", 3)
    assert "prefixes" not in concatenate_sharing_prefixes([row([1, 2], [3]), row([1, 2], [4])])
    assert "prefixes" in concatenate_sharing_prefixes([row([1, 2, 5], [3]), row([1, 2, 5], [4])])


@pytest.mark.parametrize(
    "rows",
    [
        [row([1, 2], [3]), row([2, 4], [3])],
        [row([1, 2], [3], sample_lengths=[1, 2]), row([4, 3], [4], sample_lengths=[1, 2])],
        [row([], [1, 2]), row([2], [2])],
        [row([1], []), row([1], [])],
    ],
    ids=["other prompts", "packed", "other first tokens", "nothing behind the prompt"],
)
def test_what_shares_no_prompt_is_laid_out_as_before(rows):
    found, expected = concatenate_sharing_prefixes(rows), concatenate_rows(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])) for key in expected)


def test_the_pairs_of_a_batch_find_each_other():
    """A batch has all chosen answers, then all rejected ones."""
    pairs = [
        {f"{part}_{name}": values for part, one in (("chosen", a), ("rejected", b)) for name, values in one.items()}
        for a, b in ((row([1, 2], [3]), row([1, 2], [4])), (row([5, 6], [7]), row([5, 6], [8])))
    ]
    batch = collate(pairs, concatenate_sharing_prefixes)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["targets"].tolist() == [3, 7, 4, 8] and batch["ends"].tolist() == [2, 6, 3, 7]


def test_parts_of_a_row_share_with_each_other_alone():
    """Two rows of two parts: first the first parts, then the second ones."""
    parts = [row([1, 2], [3]), row([1, 2], [4]), row([1, 2], [5]), row([1, 2], [6])]
    batch = concatenate_sharing_prefixes(parts, num_parts=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 1, 2, 4, 6]]
    assert batch["prefixes"].tolist() == [[0, 0], [0, 2], [0, 0], [4, 2]]
    assert batch["targets"].tolist() == [3, 4, 5, 6] and batch["positions"].tolist() == [1, 5, 1, 5]


ROW = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.booleans())
def test_every_row_can_be_read_back(drawn, is_packed):
    rows = [row(prompt, answer, weights=[0.5] * len(prompt + answer) if w else []) for prompt, answer, w in drawn]
    found, plain = concatenate_sharing_prefixes(packed(rows) if is_packed else rows), concatenate_rows(rows)
    for name in ("targets", "target_rows", "weights"):
        assert (name in found) == (name in plain)
        assert name not in plain or torch.equal(found[name], plain[name])
    ids, positions = found["input_ids"][0], found["position_ids"][0]
    bounds = found["cu_seq_lens_q"].tolist()
    prefixes = found.get("prefixes", torch.zeros(len(rows), 2, dtype=torch.int32)).unflatten(1, (-1, 2)).tolist()
    seen = []
    for start, end, runs in zip(bounds, bounds[1:], prefixes, strict=False):
        places = [place for first, length in (*runs, (start, end - start)) for place in range(first, first + length)]
        assert positions[places].tolist() == list(range(len(places))) and places == sorted(places)
        seen.append(ids[places].tolist())
    assert sorted(seen) == sorted(one["input_ids"] for one in rows)
    contexts = {tuple(one[: n + 1]) for one in seen for n in range(len(one) - 1)}
    assert len(ids) <= len(contexts) + len(rows), "what has the same tokens before it is there once"
    assert [ids[end].item() for end in found["ends"]] == [one["input_ids"][-1] for one in rows]
    before_target = [
        one["input_ids"][i] for one in rows for i in range(len(one["labels"]) - 1) if one["labels"][i + 1] >= 0
    ]
    assert ids[found["positions"]].tolist() == before_target
    assert tokens_in(found) == sum(len(one["input_ids"]) for one in rows)


def packed(rows):
    """One row of which these are the samples."""
    weights = [weight for one in rows for weight in one["weights"] or [1.0] * len(one["input_ids"])]
    return [
        {
            "input_ids": [token for one in rows for token in one["input_ids"]],
            "labels": [label for one in rows for label in (IGNORE_INDEX, *one["labels"][1:])],
            "weights": weights if any(one["weights"] for one in rows) else [],
            "sample_lengths": [len(one["input_ids"]) for one in rows],
        }
    ]
