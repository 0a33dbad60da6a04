"""Loss weights that messages bring along (`"loss"`, 0 to 1).

A number on an answer is the weight of all its tokens, including its end; on a question, of the tokens of its text. The
number of a span is the weight of the tokens that begin in it. Everything else has the default of the run: answers 1,
prompts 0.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from luthier.core.errors import RowError
from luthier.data.chat.encoder import TextWithSpans, TurnIds
from luthier.data.chat.render import Turn
from luthier.data.media.expand import Seen, expanded_pieces, expanded_text
from luthier.data.media.tokens import BlockToken
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, NumMarks, label_turns
from luthier.data.rows.tokenize import Written
from luthier.data.templates import Piece
from luthier.data.types import ANSWERING, Dialogue, Message, Span

Weights = list[float]
_MARKS = ("\ue000", "\ue001", "\ue002")
"""Private-use characters. One of them is appended to a message to locate it in the rendered text."""


def carries_weights(messages: Sequence[Message]) -> bool:
    return any(message.loss is not None for message in messages)


def weighted_rows(
    dialogue: Dialogue,
    written: Sequence[Written],
    turns: Sequence[list[TurnIds]],
    encoding: Encoding,
    *,
    train_on_prompt: bool,
    mask_history: bool,
    seen: Seen | None = None,
) -> list[Encoded]:
    """The rows of a conversation, with `turns` the (prompt ids, answer ids) of each. Raises `RowError`.

    `seen`: its images, which have one character each in `written` and a block in `turns`."""
    rows: list[Encoded] = []
    last = len(dialogue.messages) // 2
    for row, own_turns in zip(reversed(written), reversed(turns), strict=True):
        first = last - len(own_turns)  # the answers of a row end where the next row begins
        defaults = [
            (float(train_on_prompt), 0.0 if mask_history and number < len(dialogue.messages) // 2 - 1 else 1.0)
            for number in range(first, last)
        ]
        texts = iter(()) if seen is None else seen.texts(row)
        weigher = _Weigher(dialogue, encoding, keeps_thoughts=not mask_history, texts=texts)
        if isinstance(row, TextWithSpans):
            weights = weigher.of_spans(row, first, defaults)
        else:
            weights = [weigher.of_turn(row[index], first + index, base) for index, base in enumerate(defaults)]
        # An answer without tokens has no spans; its end is that of the conversation, which the format writes.
        ends = [
            answer[-1] if answer else _even_weight(dialogue.messages[2 * number + 1], base) or 0.0
            for number, ((_, answer), (_, base)) in enumerate(zip(weights, defaults, strict=True), first)
        ]
        rows.append(
            _within_budget(
                own_turns,
                weights,
                ends,
                cutoff_len=encoding.cutoff_len,
                mask_history=mask_history,
                eos_token_id=encoding.closing_eos,
                num_marks=encoding.num_marks,
            )
        )
        last = first
    return rows[::-1]


@dataclass(frozen=True, slots=True)
class _Weigher:
    dialogue: Dialogue
    encoding: Encoding
    keeps_thoughts: bool
    """Whether earlier answers were rendered with their thoughts."""
    texts: Iterator[str]
    """What takes the places of images in a row, in order; each message takes its own."""

    def of_turn(self, turn: Turn, number: int, base: tuple[float, float]) -> tuple[Weights, Weights]:
        """The weights of the tokens of a turn that consists of pieces. `base`: the defaults of its two sides."""
        return (
            self._of_side(2 * number, turn.prompt, base[0]),
            self._of_side(2 * number + 1, turn.answer, base[1]),
        )

    def _of_side(self, index: int, pieces: Sequence[Piece], base: float) -> Weights:
        message, encoder = self.dialogue.messages[index], self.encoding.encoder
        even = _even_weight(message, base)
        if even is not None:
            return [even] * len(encoder.pieces(expanded_pieces(pieces, self.texts)))
        at, start, written = self._place_in_pieces(index, pieces)
        spans = _spans_at(start, message, written)
        weights: Weights = []
        for order, piece in enumerate(pieces):
            if order == at and isinstance(piece, str):
                text, moved = expanded_text(piece, self.texts, spans)
                weights += _by_character(encoder.begins(text), moved, base)
            else:
                weights += [base] * len(encoder.pieces(expanded_pieces([piece], self.texts)))
        return weights

    def of_spans(
        self, row: TextWithSpans, first: int, base: Sequence[tuple[float, float]]
    ) -> list[tuple[Weights, Weights]]:
        """The same for a row that the model's own chat template rendered, starting with answer `first`."""
        spans: list[Span] = []
        bounds = [0, *row.borders]
        for order, weight in enumerate(chain.from_iterable(base)):
            message = self.dialogue.messages[2 * first + order]
            even = _even_weight(message, weight)
            if even is None:
                place = self._place_in_text(2 * first + order, row.text, bounds[order], bounds[order + 1])
                spans += _filled_up(_spans_at(place[0], message, place[1]), bounds[order], bounds[order + 1], weight)
            else:
                spans.append(Span(bounds[order], bounds[order + 1], even))
        borders = [Span(0, border, 0.0) for border in row.borders]
        text, moved = expanded_text(row.text, self.texts, [*spans, *borders])
        spans, ends = moved[: len(spans)], tuple(border.end for border in moved[len(spans) :])
        begun = self.encoding.encoder.begins_of(TextWithSpans(text, ends))
        sides = [_by_character(begins, spans, 0.0) for begins in begun]
        return list(zip(sides[::2], sides[1::2], strict=True))

    def _place_in_pieces(self, index: int, pieces: Sequence[Piece]) -> tuple[int, int, str]:
        """(piece, character) where the text of message `index` begins, and as much of it as is written there: white
        space around it may be left out. Raises `RowError` if it is rewritten."""
        message = self.dialogue.messages[index]
        mark = _mark(message)
        (turns,) = self.encoding.written(self._marked(index, mark), keep_past_thinking=self.keeps_thoughts)
        assert not isinstance(turns, TextWithSpans), "rendered by the same format"
        turn = turns[index // 2]
        for order, piece in enumerate(turn.answer if index % 2 else turn.prompt):
            if isinstance(piece, str) and mark in piece and order < len(pieces) and isinstance(pieces[order], str):
                return order, *_start(message, piece, mark, str(pieces[order]))
        raise _rewritten(message)

    def _place_in_text(self, index: int, text: str, begin: int, end: int) -> tuple[int, str]:
        """The same in a row that the model's own chat template rendered: between `begin` and `end`.

        A text that stands there several times is located by what the template writes after it.
        """
        assert self.encoding.model_template is not None, "the row was rendered by it"
        message = self.dialogue.messages[index]
        place = text.find(message.content, begin, end)
        if message.content and place >= 0 and place == text.rfind(message.content, begin, end):
            return place, message.content
        mark = _mark(message)
        marked = self.encoding.model_template.asked_at(self._marked(index, mark), index if index % 2 else index + 1)
        _, found, after = (marked.answer if index % 2 else marked.prompt).rpartition(mark)
        end -= len(after)
        if found and text.startswith(after, end):
            content = message.content
            for written in (content, content.lstrip(), content.rstrip(), content.strip()):
                start = end - len(written)
                if written and start >= begin and text.startswith(written, start):
                    return start, written
        raise _rewritten(message)

    def _marked(self, index: int, mark: str) -> Dialogue:
        messages = list(self.dialogue.messages)
        messages[index] = replace(messages[index], content=messages[index].content + mark)
        return replace(self.dialogue, messages=tuple(messages))


def _even_weight(message: Message, base: float) -> float | None:
    """The weight of all tokens on this side of a turn; None if they have different weights."""
    if message.loss is None or message.loss == ():
        return base
    if isinstance(message.loss, tuple):
        return None
    if message.role in ANSWERING:
        return message.loss
    return base if message.loss == base else None


def _spans(message: Message) -> tuple[Span, ...]:
    assert message.loss is not None, "called only for messages that carry a loss"
    if isinstance(message.loss, tuple):
        return message.loss
    return (Span(0, len(message.content), message.loss),) if message.content else ()


def _spans_at(start: int, message: Message, written: str) -> list[Span]:
    """The spans of a message of which `written` stands at `start`: the whole text, or all but white space around it."""
    left_out = message.content.index(written)
    spans = [(max(s.start - left_out, 0), min(s.end - left_out, len(written)), s.weight) for s in _spans(message)]
    return [Span(start + begin, start + end, weight) for begin, end, weight in spans if begin < end]


def _filled_up(spans: Sequence[Span], start: int, end: int, base: float) -> Iterator[Span]:
    """The spans, with spans of weight `base` for the gaps between them and up to `start` and `end`."""
    for span in spans:
        if start < span.start:
            yield Span(start, span.start, base)
        yield span
        start = span.end
    if start < end:
        yield Span(start, end, base)


def _by_character(begins: Sequence[int], spans: Sequence[Span], base: float) -> Weights:
    """The weight of the span that each token begins in, `base` outside of them. Spans are in order."""
    starts = [span.start for span in spans]
    weights = []
    for begin in begins:
        index = bisect_right(starts, begin) - 1
        weights.append(spans[index].weight if index >= 0 and begin < spans[index].end else base)
    return weights


def _start(message: Message, marked: str, mark: str, text: str) -> tuple[int, str]:
    """Where the message begins in `text`, and as much of it as is written there. `text` equals `marked` except for the
    mark after the message and white space around it."""
    end = marked.find(mark)
    for written in (message.content, message.content.lstrip()):
        start = end - len(written)
        if start >= 0 and marked[start:end] == written and text.startswith(marked[:end].rstrip()):
            return start, written if text.startswith(marked[:end]) else written.rstrip()
    raise _rewritten(message)


def _mark(message: Message) -> str:
    unused = next((mark for mark in _MARKS if mark not in message.content), None)
    if unused is None:
        raise RowError(f"the text holds {', '.join(map(repr, _MARKS))}, so its 'loss' cannot be located")
    return unused


def _rewritten(message: Message) -> RowError:
    return RowError(
        f"the chat format rewrites a message of role {message.role}, so parts of it cannot have weights of their own"
    )


def _numbers(ids: Sequence[int], start: int) -> list[int]:
    """The numbers of tokens from `start` on; those of blocks of images know their image, as the ids do."""
    return [
        BlockToken.of(number, token.item) if isinstance(token, BlockToken) else number
        for number, token in enumerate(ids, start)
    ]


def _within_budget(
    turns: Sequence[TurnIds],
    weights: Sequence[tuple[Weights, Weights]],
    ends: Weights,
    *,
    cutoff_len: int | None,
    mask_history: bool,
    eos_token_id: int | None,
    num_marks: NumMarks,
) -> Encoded:
    """Truncates as `label_turns` does: it is called with token numbers instead of ids, and the result is looked up.

    `ends`: the weight of the end of each answer."""
    ids = [token for turn in turns for side in turn for token in side]
    all_weights = [weight for turn in weights for side in turn for weight in side]
    assert len(ids) == len(all_weights), "every token has a weight"
    numbered, at = [], 0
    for prompt, answer in turns:
        middle, end = at + len(prompt), at + len(prompt) + len(answer)
        numbered.append((_numbers(prompt, at), _numbers(answer, middle)))
        at = end
    closing = None if eos_token_id is None else len(ids)
    row = label_turns(
        numbered,
        cutoff_len=cutoff_len,
        mask_history=mask_history,
        eos_token_id=closing,
        num_marks=lambda numbers: num_marks([ids[number] for number in numbers]),
    )
    kept = row.input_ids if closing is None else row.input_ids[:-1]
    stays = set(kept)
    row_ids, row_weights = [ids[token] for token in kept], [all_weights[token] for token in kept]
    labels = [token if weight else IGNORE_INDEX for token, weight in zip(row_ids, row_weights, strict=True)]
    # An answer lost its end if a part of its turn is left; a turn that is gone completely teaches nothing.
    begun = (turn for turn in numbered if not stays.isdisjoint(chain(*turn)))
    cut = any(answer and answer[-1] not in stays and all_weights[answer[-1]] for _, answer in begun)
    if eos_token_id is not None:
        last_tokens = [(answer or prompt)[-1] if answer or prompt else -1 for prompt, answer in numbered]
        end_weights = dict(zip(last_tokens, ends, strict=True))
        openings = ([token for token in prompt if token in stays][:1] for prompt, _ in numbered[1:])
        before = {first: last for last, opening in zip(last_tokens, openings, strict=False) for first in opening}
        for place, token in enumerate(kept):
            weight = end_weights[before[token]] if before.get(token) in stays else 0.0
            if weight and labels[place] == IGNORE_INDEX:
                labels[place], row_weights[place] = eos_token_id, weight
        ends_in_answer = bool(kept) and row.labels[-1] == closing
        last = end_weights.get(kept[-1], 0.0) if ends_in_answer else 0.0
        row_ids.append(eos_token_id)
        labels.append(eos_token_id if last else IGNORE_INDEX)
        row_weights.append(last)
    num_wanted = sum(weight > 0 for weight in all_weights)
    return Encoded(
        row_ids,
        labels,
        lost_tokens=len(ids) - len(kept),
        lost_labels=num_wanted - sum(all_weights[token] > 0 for token in kept),
        lost_terminator=cut,
        shortened_prompts=row.shortened_prompts,
        weights=row_weights if set(row_weights) - {0.0, 1.0} else [],
    )
