"""The closing marks of a prompt: the tokens after its last text, which end the turn of the user and open the answer.

    <|im_start|>user\\nHow are you?<|im_end|>\\n<|im_start|>assistant\\n
                                  └──────── closing marks ────────┘

A prompt that is too long loses text before them, never the marks: without them the answer would follow the question as
if the user went on.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import takewhile

from luthier.core.errors import RowError
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.templates import CONTENT, Piece, Slot, Template
from luthier.data.types import Message

Marks = tuple[tuple[int, ...], ...]
"""The token ids that may end a prompt: after a question, after the result of a tool, with and without a thought."""

QUESTION = "⟪question⟫"


@lru_cache(maxsize=8)
def closing_marks(encoder: Encoder, template: Template, model_template: ModelChatTemplate | None) -> Marks:
    """Those of a named format, or of the model's own chat template if that renders the conversations."""
    if model_template is not None:
        endings = [encoder.text(text) for text in _rendered_endings(model_template)]
    else:
        endings = [encoder.pieces(pieces) for pieces in _endings(template)]
    return tuple(dict.fromkeys(map(tuple, endings)))


def num_closing_marks(prompt: Sequence[int], marks: Marks) -> int:
    """How many tokens at the end of a prompt are its closing marks.

    A token that holds the end of the text and the beginning of the marks counts as one of them.
    """
    best = (0, 0)
    for ending in marks:
        pairs = zip(reversed(prompt), reversed(ending), strict=False)
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        best = max(best, (equal, -len(ending)))
    equal, length = best[0], -best[1]
    return min(len(prompt), equal + (equal < length))


def _endings(template: Template) -> Iterator[tuple[Piece, ...]]:
    for slot in (template.user, template.observation):
        ending = _after_content(slot)
        yield ending
        if template.reasons:
            yield (*ending, template.empty_thought)


def _after_content(slot: Slot) -> tuple[Piece, ...]:
    """The pieces of a slot after its content."""
    place = max(index for index, piece in enumerate(slot) if isinstance(piece, str) and CONTENT in piece)
    rest = str(slot[place]).rpartition(CONTENT)[2]
    return ((rest,) if rest else ()) + slot[place + 1 :]


def _rendered_endings(model_template: ModelChatTemplate) -> Iterator[str]:
    """The texts after a question that stands alone, and after one that follows an answer."""
    question = Message("user", QUESTION)
    for messages in ([question], [Message("user", "Hi"), Message("assistant", "Hello."), question]):
        for thinks in (True, False):
            try:
                text = model_template.text(messages, None, "", asks=True, thinks=thinks)
            except RowError:
                continue
            if QUESTION in text:
                yield text.rpartition(QUESTION)[2]
