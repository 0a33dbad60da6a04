"""Parts of equal shape are gone through once in a plan, and are counted as often as there are."""

from contextlib import contextmanager

import pytest

from luthier.model.kernels.repeats import counted, slices


@pytest.mark.parametrize(("num_rows", "size"), [(0, 4), (3, 4), (8, 4), (9, 4), (12, 4), (14, 4), (40, 4)])
def test_all_rows_are_counted(num_rows, size):
    times, found = [1], []

    @contextmanager
    def repeated(number):
        times.append(times[-1] * number)
        yield
        times.pop()

    whole = list(slices(num_rows, size))
    assert [row for part in whole for row in range(num_rows)[part]] == list(range(num_rows))
    with counted(repeated):
        for part in slices(num_rows, size):
            found += [part.stop - part.start] * times[-1]
    assert found == [part.stop - part.start for part in whole]
    assert list(slices(num_rows, size)) == whole
