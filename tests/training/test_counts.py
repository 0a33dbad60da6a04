"""The counts of a batch are those that its tensors give, and are made with it."""

import pytest

from luthier.data.collate import FAULT, concatenate_rows, tokens_in
from luthier.stages._causal import count_targets
from luthier.training.counts import COUNTS, Counting, Counts
from luthier.training.parts import collator

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]


@pytest.mark.parametrize("concatenates", [True, False])
def test_units_and_tokens_of_a_batch(concatenates):
    counting = Counting(collator(0, concatenate_rows if concatenates else None), count_targets)
    batch = counting(ROWS)
    assert batch[COUNTS] == Counts(num_units=3, num_tokens=5)
    assert (count_targets(batch), tokens_in(batch)) == (3, 5)


def test_a_batch_is_counted_once_and_one_without_counts_now():
    counting = Counting(collator(0, None), count_targets)
    batch = counting(ROWS)
    assert Counting(collator(0, None), lambda batch: pytest.fail("counted again")).of(batch) is batch[COUNTS]
    del batch[COUNTS]
    assert counting.of(batch) == Counts(3, 5)


def test_a_batch_that_could_not_be_made_has_none():
    fault = {FAULT: ValueError("no image")}
    assert Counting(lambda rows: fault, count_targets)(ROWS) is fault
