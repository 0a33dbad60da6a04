"""The parts of a batch are the batch: every token and every target is in one of them."""

import pytest
import torch

from luthier.data.collate import concatenate_rows, tokens_in
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.sequence_slices import concatenate_slice

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE_INDEX, 6, 7, 8, 9]},
    {"input_ids": [10, 11], "labels": [IGNORE_INDEX, 11], "weights": [1.0, 0.5]},
    {"input_ids": [12, 13, 14, 15], "labels": [IGNORE_INDEX, IGNORE_INDEX, 14, 15]},
]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 5, 11])
def test_the_parts_together_are_the_row(num_parts):
    whole = concatenate_rows(ROWS)
    parts = [concatenate_slice(ROWS, part, num_parts) for part in range(num_parts)]
    num_tokens, lengths = whole["input_ids"].shape[1], {part["input_ids"].shape for part in parts}
    assert len(lengths) == 1, "all processes have as many tokens"
    for name in ("input_ids", "position_ids"):
        joined = torch.cat([part[name] for part in parts], 1)
        assert torch.equal(joined[:, :num_tokens], whole[name])
        assert joined.shape[1] - num_tokens < num_parts
    for name in ("targets", "target_rows", "weights"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    positions = torch.cat([part["positions"] + part["slice_start"] for part in parts])
    assert torch.equal(positions, whole["positions"])
    assert sum(map(tokens_in, parts)) == num_tokens
    for part in parts:
        assert part["cu_seq_lens_q"][-1] == num_parts * part["input_ids"].shape[1]
        assert torch.equal(part["cu_seq_lens_q"][: len(ROWS) + 1], whole["cu_seq_lens_q"])


def test_the_last_token_of_a_part_predicts_the_first_of_the_next():
    first, second = (concatenate_slice(ROWS[:1], part, 2) for part in range(2))
    assert first["input_ids"].tolist() == [[5, 6, 7]]
    assert first["positions"].tolist() == [0, 1, 2] and first["targets"].tolist() == [6, 7, 8]
    assert second["input_ids"].tolist() == [[8, 9, 5]], "one token fills the row"
    assert second["positions"].tolist() == [0] and second["targets"].tolist() == [9]
    assert second["position_ids"].tolist() == [[3, 4, 0]]
    assert second["cu_seq_lens_q"].tolist() == [0, 5, 6]


def test_a_packed_row_keeps_its_samples():
    packed = [{**ROWS[0], "labels": [-100, 6, -100, 8, 9], "sample_lengths": [2, 3]}]
    part = concatenate_slice(packed, 1, 2)
    assert part["cu_seq_lens_q"].tolist() == [0, 2, 5, 6] and part["position_ids"].tolist() == [[1, 2, 0]]
