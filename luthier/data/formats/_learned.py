"""How much a message counts in the loss, in the words of this and of other tools.

`loss` is this project's own key: a number from 0 to 1, or spans. Others write a boolean or 0 and 1: `loss` (ms-swift,
XTuner), `train` and `train_detail` (Axolotl), `weight` (OpenAI, Mistral), `trainable` (Tinker), `masked` (torchtune),
`step_loss_mask` (slime). A key that clearly is about training and has none of these meanings is a `RowError`.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from luthier.core.errors import RowError
from luthier.data.formats._columns import kind
from luthier.data.training_keys import is_about_training
from luthier.data.types import ANSWERING, LOSS_KEY, Role, Span

Loss = float | tuple[Span, ...] | None
_SPAN_KEYS = ("begin_offset", "end_offset", "train")


def loss_of(message: Mapping[str, Any], content: str, role: Role | str | None, place: str) -> Loss:
    """The weight that a message gives itself; None if it says nothing. Spans are of `content`.

    Raises `RowError` for values without meaning, for keys that disagree, and for unknown keys about training.
    """
    found: dict[str, Loss] = {}
    for key, value in message.items():
        if value is None or not is_about_training(key):
            continue
        read = _READERS.get(key.lower())
        if read is None:
            raise RowError(
                f"{key!r} of {place} looks like a say in what is learned, and is not understood "
                f"-> use {LOSS_KEY!r}, a number from 0 to 1, or remove it",
                repr(key),
            )
        loss = read(value, content, f"{key!r} of {place}")
        if key.lower() != "weight" or role in ANSWERING:  # defined for answers only
            found[key] = loss
    if len(set(found.values())) > 1:
        names = " and ".join(map(repr, found))
        raise RowError(f"{names} of {place} disagree about what is learned -> keep one of them")
    return next(iter(found.values()), None)


def _spans(items: list[Any], content: str, place: str, read: Callable[[Any, int, str], Span]) -> tuple[Span, ...]:
    spans = tuple(read(item, len(content), f"part {number} of {place}") for number, item in enumerate(items, start=1))
    for before, after in pairwise(spans):
        if after.start < before.end:
            raise RowError(f"the parts of {place} are not in order, or share characters")
    return spans


def _span(item: Any, num_characters: int, place: str) -> Span:
    """[start, end, number]; `end` is the first character after it."""
    if not isinstance(item, list) or len(item) != 3:
        raise RowError(f"{place} is {kind(item)}, not [start, end, number]")
    start, end, weight = item
    return Span(*_bounds(start, end, num_characters, place), _number(weight, place))


def _detail(item: Any, num_characters: int, place: str) -> Span:
    """{begin_offset, end_offset, train}; `end_offset` is the last character of it."""
    if not isinstance(item, Mapping) or any(item.get(key) is None for key in _SPAN_KEYS):
        raise RowError(f"{place} is {kind(item)}, not an object with {', '.join(_SPAN_KEYS)}")
    start, end, learned = (item[key] for key in _SPAN_KEYS)
    after = end + 1 if isinstance(end, int) else end
    return Span(*_bounds(start, after, num_characters, place), _switch(learned, "", place))


def _bounds(start: Any, end: Any, num_characters: int, place: str) -> tuple[int, int]:
    if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (start, end)):
        raise RowError(f"{place}: start and end must be whole numbers")
    if not 0 <= start < end <= num_characters:
        reason = f"{place}: {start} to {end} is not part of a text of {num_characters} characters"
        raise RowError(reason, f"{start} to {end}", str(num_characters))
    return start, end


def _number(value: Any, place: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RowError(f"{place} is {kind(value)}, not a number")
    if not 0 <= value <= 1:
        raise RowError(f"{place} is {value}, not from 0 to 1", str(value))
    return float(value)


def _loss(value: Any, content: str, place: str) -> Loss:
    if isinstance(value, list):
        return _spans(value, content, place, _span)
    return _weight(value, content, place)


def _weight(value: Any, content: str, place: str) -> float:
    return float(value) if isinstance(value, bool) else _number(value, place)


def _details(value: Any, content: str, place: str) -> Loss:
    if not isinstance(value, list):
        raise RowError(f"{place} is {kind(value)}, not a list")
    return _spans(value, content, place, _detail) or None


def _switch(value: Any, content: str, place: str) -> float:
    if value not in (True, False):  # 0 and 1 are equal to them
        raise RowError(f"{place} is {kind(value)}, not true, false, 1 or 0")
    return float(value)


def _masked(value: Any, content: str, place: str) -> float:
    return 1 - _switch(value, content, place)


_READERS: Mapping[str, Callable[[Any, str, str], Loss]] = {
    LOSS_KEY: _loss,
    "loss_weight": _weight,
    "loss_scale": _weight,
    "weight": _weight,
    "train": _switch,
    "trainable": _switch,
    "loss_mask": _switch,
    "step_loss_mask": _switch,
    "masked": _masked,
    "train_detail": _details,
}
"""Key in small letters -> (value, content, place) -> the weight. A loss mask is 1 where something is learned."""
