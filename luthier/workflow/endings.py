"""Every answer has an end: a token at which generation stops, in the slots of the format or after the conversation."""

from collections.abc import Collection
from dataclasses import replace

from luthier.core.errors import RowError
from luthier.data.rows.encoding import Encoding
from luthier.data.types import Dialogue, Message

_TALK = Dialogue((Message("user", "Hi"), Message("assistant", "Hello.")))


def has_end(encoding: Encoding, stop_ids: Collection[int]) -> bool:
    """Whether the format writes a token of `stop_ids` after an answer, or the eos after a conversation.

    True for a chat template that refuses the sample: its rows will say so.
    """
    if encoding.template.efficient_eos:
        return True
    try:
        rows = encoding.unlimited().rows(_TALK, keep_past_thinking=True)
    except RowError:
        return True
    _, answer = rows[-1][-1]
    return any(token in stop_ids for token in answer)


def with_end(encoding: Encoding, stop_ids: Collection[int]) -> Encoding:
    """The encoding; if its format ends answers with no token of `stop_ids`, the eos is learned after each of them."""
    if has_end(encoding, stop_ids):
        return encoding
    return replace(encoding, template=replace(encoding.template, efficient_eos=True))
