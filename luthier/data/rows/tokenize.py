"""Tokenizes batches of rendered conversations in a thread, while the next ones are read and rendered.

The tokenizer uses all cores and releases the GIL, so the Python work next to it takes hardly any extra time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from luthier.data.chat.continuation import without_empty_thought
from luthier.data.chat.encoder import Encoder, TextWithSpans, TurnIds
from luthier.data.chat.render import Turn
from luthier.data.templates import Template

Written = tuple[Turn, ...] | TextWithSpans
"""One row before it is tokenized."""

NUM_BATCHES_AHEAD = 2
"""One that is being tokenized, and one that waits."""

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def turn_ids(encoder: Encoder, written: Sequence[Written]) -> list[list[TurnIds]]:
    """The (prompt ids, answer ids) of every turn of every row. Each distinct text is tokenized once."""
    pieced = [turn for row in written if not isinstance(row, TextWithSpans) for turn in row]
    known = encoder.known(p for turn in pieced for side in (turn.prompt, turn.answer) for p in side if type(p) is str)
    encode_spans = iter(encoder.encode_spans([row for row in written if isinstance(row, TextWithSpans)]))
    return [
        next(encode_spans)
        if isinstance(row, TextWithSpans)
        else [(encoder.encode_pieces(turn.prompt, known), encoder.encode_pieces(turn.answer, known)) for turn in row]
        for row in written
    ]


def num_characters(written: Written) -> int:
    """The approximate size of a row."""
    if isinstance(written, TextWithSpans):
        return len(written.text)
    return sum(len(piece) for turn in written for piece in (*turn.prompt, *turn.answer) if isinstance(piece, str))


def text_of(written: Written) -> str:
    """The text of a row, without the tokens that a format gives as such."""
    if isinstance(written, TextWithSpans):
        return written.text
    return "".join(piece for turn in written for piece in (*turn.prompt, *turn.answer) if isinstance(piece, str))


def num_begun_empty(written: Written, template: Template, *, only_last: bool) -> int:
    """How many answers begin with an empty thought that the chat format adds. `only_last`: of the last answer alone."""
    if isinstance(written, TextWithSpans):
        edges = written.edges
        answers = [written.text[start:end] for start, end in zip(edges[1::2], edges[2::2], strict=False)]
        begun = [without_empty_thought(answer) != answer for answer in answers]
    else:
        begun = [template.reasons and turn.answer[:1] == (template.empty_thought,) for turn in written]
    return sum(begun[-1:] if only_last else begun)


def ahead(batches: Iterable[Batch], work: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
    """(batch, work(batch)) in order. A thread works ahead while the caller handles earlier batches."""
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        for batch in batches:
            waiting.append((batch, thread.submit(work, batch)))
            if len(waiting) > NUM_BATCHES_AHEAD:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
