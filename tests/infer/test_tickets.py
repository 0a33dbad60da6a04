"""A ticket hands over what arrives for it, and streams end with their answer or their error."""

import pytest

from luthier.infer.tickets import QueuedTicket, Streaming
from luthier.infer.types import Answer, Piece, Settings

ANSWER = Answer(text="ab", num_prompt_tokens=1, num_new_tokens=2, finish_reason="stop")


class Row:
    is_canceled = False


class Saying(Streaming):
    """Every ticket gets these items."""

    def __init__(self, *items):
        self.items, self.row = items, Row()

    def submit(self, prompt_ids, settings, deliver=None):
        ticket = QueuedTicket()
        ticket.belongs_to(self.row)
        for item in self.items:
            ticket.deliver(item)
        return ticket


def test_an_answer_is_known_after_the_last_piece():
    ticket = QueuedTicket()
    with pytest.raises(AssertionError):
        _ = ticket.answer
    for item in (Piece("a"), Piece("b"), ANSWER):
        ticket.deliver(item)
    assert [piece.text for piece in ticket.pieces()] == ["a", "b"] and ticket.answer is ANSWER


def test_a_stream_leaves_empty_pieces_out_and_returns_the_answer():
    model = Saying(Piece("a"), Piece(""), Piece("b"), ANSWER)
    assert list(model.stream([1], Settings())) == ["a", "b"]
    assert model.generate([1], Settings()) is ANSWER


def test_a_stream_that_is_closed_cancels_and_an_error_is_raised():
    model = Saying(Piece("a"), Piece("b"), ANSWER)
    stream = model.stream([1], Settings())
    next(stream)
    stream.close()
    assert model.row.is_canceled
    with pytest.raises(ZeroDivisionError):
        list(Saying(Piece("a"), ZeroDivisionError()).stream([1], Settings()))
