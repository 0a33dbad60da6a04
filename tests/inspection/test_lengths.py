"""Lengths of rows: the smallest cutoff that keeps a share, and the histogram."""

import pytest

from luthier.inspection.lengths import bars, measured, smallest_cutoff


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 2, 3, 400], [5, 90, 91, 1000, 1000]])
def test_the_smallest_cutoff_is_the_smallest(lengths, share):
    def kept(cutoff: int) -> float:
        return sum(min(length, cutoff) for length in lengths)

    cutoff = smallest_cutoff(lengths, share)
    assert kept(cutoff) >= share * sum(lengths) > kept(cutoff - 1)


def test_the_histogram_counts_every_row():
    measures = measured([3, 40, 41, 999], 50)
    assert sum(rows for *_, rows in measures["histogram"]) == 4 and len(measures["histogram"]) <= 12
    assert "< cutoff_len" in next(line for line in bars(measures) if "0 to  99" in line)
