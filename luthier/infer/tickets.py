"""Answers that another thread waits for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from luthier.infer.types import Answer, Piece, Settings

if TYPE_CHECKING:
    from luthier.infer.engines import Delivery, Ticket
    from luthier.infer.row import Row


class QueuedTicket:
    """An answer that one other thread waits for."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[Delivery] = SimpleQueue()
        self._row: Row | None = None
        self._answer: Answer | None = None

    def deliver(self, item: "Delivery") -> None:
        self._arrived.put(item)

    def belongs_to(self, row: "Row") -> None:
        self._row = row

    def pieces(self) -> Iterator[Piece]:
        while True:
            item = self._arrived.get()
            if isinstance(item, Piece):
                yield item
            elif isinstance(item, Answer):
                self._answer = item
                return
            else:
                raise item

    @property
    def answer(self) -> Answer:
        assert self._answer is not None, "the answer is known after the last piece"
        return self._answer

    def cancel(self) -> None:
        assert self._row is not None
        self._row.is_canceled = True


class Streaming(ABC):
    """What every engine does alike once it has `submit`."""

    @abstractmethod
    def submit(
        self, prompt_ids: Sequence[int], settings: Settings, deliver: "Callable[[Delivery], None] | None" = None
    ) -> "Ticket":
        """As in `luthier.infer.engines.Generating`."""

    def stream(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[str, None, Answer]:
        ticket = self.submit(prompt_ids, settings)
        try:
            for piece in ticket.pieces():
                if piece.text:
                    yield piece.text
        finally:
            ticket.cancel()
        return ticket.answer

    def generate(self, prompt_ids: Sequence[int], settings: Settings) -> Answer:
        pieces = self.stream(prompt_ids, settings)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                return done.value
