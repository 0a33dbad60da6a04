"""The time that training waits for its batches."""

import pytest

from luthier.training.watch.waiting import Waiting


class Clock:
    """The monotonic clock, which goes on when it is told to."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


def test_only_the_time_of_the_iterator_counts(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("luthier.training.watch.waiting.time", clock)
    waiting = Waiting()

    def slow():
        for number in range(3):
            clock.seconds += 2
            yield number

    found = []
    for number in waiting.timed(slow()):
        clock.seconds += 30
        found.append(number)
    assert found == [0, 1, 2]
    assert waiting.seconds == 6


def test_the_remedy_is_named_where_waiting_is_long():
    waiting = Waiting()
    waiting.seconds = 2.0
    assert waiting.remark(100.0, 0) == "training waited 2.0 s for images, videos and audio, 2% of its time"
    assert [waiting.workers_needed(100.0, number) for number in (0, 2)] == [0, 2], "there are enough"
    waiting.seconds = 80.0
    assert waiting.remark(100.0, 0).endswith(
        "-> dataloader_num_workers: 4 would have been enough, with a core for each"
    )


@pytest.mark.parametrize(
    ("making", "computing", "enough"), [(4.0, 1.0, 4), (3.0, 2.0, 2), (5.0, 2.0, 3), (1.0, 2.0, 1)]
)
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_workers_that_would_have_been_enough(making, computing, enough, num_workers):
    """Of 1,000 batches, each takes `making` seconds in one process, and `computing` in the model."""
    waiting = Waiting()
    pace = max(computing, making / num_workers) if num_workers else making + computing
    waiting.seconds = 1000 * (pace - computing)
    assert waiting.workers_needed(1000 * pace, num_workers) == max(enough, num_workers)
