"""The length of the sequence that each token belongs to, padded or concatenated."""

import torch

from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.model.lengths import sequence_lengths

ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]


def test_lengths_of_the_sequences():
    assert sequence_lengths(model_inputs(concatenate_rows(ROWS))).tolist() == [[3, 3, 3, 1]]
    padded = sequence_lengths(model_inputs(pad_rows(ROWS, 0)))
    assert padded.tolist() == [[3, 3, 3, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert sequence_lengths({"input_ids": torch.zeros(2, 4, dtype=torch.long)}).tolist() == [[4] * 4] * 2
