"""The time that training waits for its batches."""

import time

from luthier.training.waiting import Waiting


def test_only_the_time_of_the_iterator_counts():
    waiting = Waiting()

    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    found = []
    for number in waiting.timed(slow()):
        time.sleep(0.03)
        found.append(number)
    assert found == [0, 1, 2]
    assert 0.06 <= waiting.seconds < 0.09


def test_the_remedy_is_named_where_waiting_is_long():
    waiting = Waiting()
    waiting.seconds = 2.0
    assert waiting.remark(100.0, 0) == "training waited 2.0 s for images, 2% of its time"
    waiting.seconds = 30.0
    assert "-> dataloader_num_workers: 2 or more" in waiting.remark(100.0, 0)
    assert "-> a larger dataloader_num_workers" in waiting.remark(100.0, 2)
