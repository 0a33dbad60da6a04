"""What a sampler by length reads of rows: their lengths, whatever the parts of a row are."""

import numpy as np
from transformers.trainer_pt_utils import LengthGroupedSampler

from luthier.data.rows.arrow import table_of
from luthier.data.rows.columns import SEQUENCE, columns_of_part
from luthier.training.reference_logps import RowsWithReference
from luthier.training.row_lengths import as_long_as


def test_a_row_is_as_long_as_all_its_texts():
    one = table_of([[[1, 2, 3], [1, 2, 3]], [[4], [4]]], SEQUENCE)
    assert as_long_as(one).num_tokens == [3, 1]
    columns = (*columns_of_part("chosen_", SEQUENCE[0].kind), *columns_of_part("rejected_", SEQUENCE[0].kind))
    pairs = table_of([[[1, 2, 3], [4]], [[5], [6]]], columns)
    assert as_long_as(pairs).num_tokens == [4, 2]
    assert as_long_as(RowsWithReference(pairs, np.zeros((2, 2), np.float32))).num_tokens == [4, 2]


def test_the_sampler_of_transformers_takes_them():
    rows = as_long_as(table_of([[list(range(n)), list(range(n))] for n in range(1, 9)], SEQUENCE))
    sampler = LengthGroupedSampler(2, dataset=rows, model_input_name="input_ids")
    assert sorted(sampler) == list(range(8)) and sampler.lengths == list(range(1, 9))
