"""Tokens of blocks know their image, and cutting leaves blocks whole."""

import pytest

from luthier.data.media.tokens import BlockToken, blocks_in, first_around, first_whole, num_block_tokens, with_blocks

IDS = with_blocks([1, 7, 7, 7, 7, 2, 7, 3], [1, 3, 3, 5, 6, 7])


def test_blocks_side_by_side_are_apart():
    assert list(blocks_in(IDS)) == [(0, 1, 3), (1, 3, 5), (2, 6, 7)]
    assert num_block_tokens(IDS) == 5
    assert IDS == [1, 7, 7, 7, 7, 2, 7, 3], "they are whole numbers"


@pytest.mark.parametrize(
    ("num_tokens", "left"), [(8, 8), (7, 7), (6, 6), (5, 5), (4, 3), (3, 3), (2, 1), (1, 1), (0, 0)]
)
def test_a_block_is_whole_or_absent(num_tokens, left):
    assert len(first_whole(IDS, num_tokens)) == left


def test_text_goes_from_the_end():
    kept = first_around(IDS, 1)
    assert kept == [1, 7, 7, 7, 7, 7]
    assert [item for item, _, _ in blocks_in(kept)] == [0, 1, 2]
    assert first_around(IDS, 0) == [7] * 5


def test_equal_ids_of_one_block_are_one_object():
    assert IDS[1] is IDS[2] and type(IDS[1]) is BlockToken
