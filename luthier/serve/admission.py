"""Which requests are let in: the queue has an end, and a server that is shutting down takes nothing new."""

from luthier.serve.errors import overloaded, stopping


class Admission:
    """Counts answers, from when they are asked for until they end or their client is gone. For one thread."""

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self.max_concurrent, self.max_queue = max_concurrent, max_queue
        self.num_answers = 0
        self.is_stopping = False

    @property
    def num_running(self) -> int:
        return min(self.num_answers, self.max_concurrent)

    @property
    def num_waiting(self) -> int:
        return self.num_answers - self.num_running

    def check(self) -> None:
        """Raises `ApiError` if a request would not be let in now."""
        if self.is_stopping:
            raise stopping()
        if self.num_answers >= self.max_concurrent + self.max_queue:
            raise overloaded(self.num_waiting)

    def enter(self, num_answers: int) -> None:
        """Raises `ApiError` as `check` does. A request for many answers is let in as a whole."""
        self.check()
        self.num_answers += num_answers

    def leave(self, num_answers: int = 1) -> None:
        self.num_answers -= num_answers
