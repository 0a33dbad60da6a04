"""MAX_CONCURRENT is a whole number above 0."""

import pytest

from luthier.core.errors import InvalidInput
from luthier.infer.concurrency import max_concurrent


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "5000"])
def test_max_concurrent_is_a_whole_number_above_0(text):
    with pytest.raises(InvalidInput, match=f"MAX_CONCURRENT: '{text}': should be a whole number from 1 to 4096"):
        max_concurrent({"MAX_CONCURRENT": text})


def test_max_concurrent_is_8_unless_set():
    assert max_concurrent({}) == max_concurrent({"MAX_CONCURRENT": " "}) == 8
    assert max_concurrent({"MAX_CONCURRENT": "3"}) == 3
