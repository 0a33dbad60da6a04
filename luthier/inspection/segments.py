"""The text, the roles and the marks of the chat format in a tokenized row.

Roles are found by searching the text for the fixed words around messages. So they are known for formats made of slots,
but not for chat templates that slots cannot express, nor for plain text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from luthier.data.chat.render import as_text
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.templates import Slot, Template
from luthier.inspection.images import Shown as ShownImage
from luthier.inspection.images import between

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoding of bytes that are not (yet) a complete character."""
MAX_TOKENS_PER_CHARACTER = 4
"""The bytes of the longest character in UTF-8."""
_SPECIAL = "\0"
"""Marks special tokens in the searched text, so that ordinary text that looks like one is not found."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A token, or several tokens that form one character."""

    ids: tuple[int, ...]
    text: str
    is_learned: bool
    is_special: bool
    weight: float = 1.0
    """The weight in the loss of a target."""
    role: str = ""
    """The role of the message; empty if unknown."""
    is_mark: bool = False
    """Whether it belongs to the chat format and not to a message."""


class RoleMarks:
    """Finds the text of a chat format around messages."""

    def __init__(self, template: Template, tokenizer: "PreTrainedTokenizerBase") -> None:
        special_tokens = {number: str(t) for number, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = frozenset(special_tokens)
        special = sorted(special_tokens.values(), key=len, reverse=True)
        self._special_words = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        closings = tuple(self._around(slot)[1] for slot in (template.assistant, template.call_slots, template.system))
        roles: dict[str, str] = {}
        for slot, role, next_role in (
            (template.system, "system", "user" if template.kind == "llama2" else ""),
            (template.user, "user", "assistant"),
            (template.observation, "tool", "assistant"),
            (template.assistant, "", ""),
            (template.call_slots, "", ""),
            (template.prefix, "", ""),
        ):
            before, after = self._around(slot)
            roles.setdefault(before, role)
            # The end of a question and the opening of its answer are one text in the slot.
            ends = [words for words in closings if next_role == "assistant" and after.startswith(words)]
            closing = max(ends, key=len, default="")
            roles.setdefault(closing, "")
            roles.setdefault(after.removeprefix(closing), next_role)
        self._roles = {words: role for words, role in roles.items() if words.strip()}
        longest_first = sorted(self._roles, key=len, reverse=True)
        self._names = {f"m{number}": words for number, words in enumerate(longest_first)}
        self._pattern = re.compile("|".join(f"(?P<{n}>{self._searched(w)})" for n, w in self._names.items()) or r"(?!)")

    def found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, role of the next message) of every mark; the role is empty if the mark only closes a message."""
        for match in self._pattern.finditer(text):
            assert match.lastgroup is not None, "every alternative is a named group"
            yield match.start(), match.end(), self._roles[self._names[match.lastgroup]]

    def _around(self, slot: Slot) -> tuple[str, str]:
        before, _, after = self._fixed(slot).partition("{{content}}")
        return before, after

    def _fixed(self, slot: Slot) -> str:
        text = as_text(slot, self._bos, self._eos)
        return self._special_words.sub(lambda match: _SPECIAL + match[0], text)

    def _searched(self, words: str) -> str:
        return r"\d+".join(re.escape(part) for part in words.split("{{idx}}"))


def shown_tokens(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    marks: RoleMarks,
    weights: Sequence[float] = (),
    images: Sequence[ShownImage] = (),
) -> list[Shown]:
    """The tokens of a row in order; their texts add up to the text of the row. `weights`: empty if all are 1.
    `images`: the blocks, each of which is shown as one token."""
    counts = weights or [1.0] * len(input_ids)
    tokens: list[Shown] = []
    for first, last, name in between(0, len(input_ids), list(images)):
        if name:
            tokens.append(Shown(tuple(input_ids[first:last]), name, is_learned=False, is_special=False))
            continue
        own = input_ids[first:last], labels[first:last], counts[first:last]
        tokens += _characters(*own, tokenizer, marks.special_ids)
    searched = [_SPECIAL + token.text if token.is_special else token.text for token in tokens]
    found = marks.found("".join(searched))
    start, end, next_role = next(found, (None, 0, ""))
    role, at, was_learned, placed = "", 0, True, []
    for token, text in zip(tokens, searched, strict=True):
        while start is not None and at >= end:
            start, end, next_role = next(found, (None, 0, ""))
        is_mark = start is not None and at >= start
        if is_mark:
            # A mark that only closes a message still belongs to it.
            role = next_role or role
        elif token.is_learned and not was_learned and role:
            # Truncation may have removed the opening of the answer with the end of its prompt.
            role = "assistant"
        was_learned = token.is_learned
        placed.append(replace(token, role=role, is_mark=is_mark))
        at += len(text)
    return placed


def prompt_and_answer(row: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a row for generation, whose labels are the answer that follows its ids."""
    prompt, answer = list(row["input_ids"]), list(row["labels"])
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer


def _characters(
    input_ids: Sequence[int],
    labels: Sequence[int],
    weights: Sequence[float],
    tokenizer: "PreTrainedTokenizerBase",
    special_ids: frozenset[int],
) -> Iterator[Shown]:
    """Tokens with their texts. The text may depend on the previous token (a leading space), so both are decoded."""

    def text_of(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    pairs = list(zip(input_ids, labels, weights, strict=True))
    for (token, label, weight), (following, next_label, next_weight) in zip(
        pairs, chain(pairs[1:], [(-1, 0, 1.0)]), strict=True
    ):
        is_learned, is_special = label != IGNORE_INDEX, token in special_ids
        waiting += (token,)
        text = text_of(before + waiting)[len(text_of(before)) :]
        breaks = following < 0 or following in special_ids or (next_label != IGNORE_INDEX) != is_learned
        breaks = breaks or next_weight != weight
        if text.endswith(UNFINISHED) and len(waiting) < MAX_TOKENS_PER_CHARACTER and not breaks and not is_special:
            continue
        yield Shown(waiting, text, is_learned, is_special, weight)
        before, waiting = waiting, ()
