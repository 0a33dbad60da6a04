"""Renders a conversation as the pieces of a chat format. Training, chat, the API and evaluation all call `render`.

Pieces are neither tokenized nor joined: their boundaries decide the token ids, see `luthier.data.templates`.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Literal

from luthier.core.errors import ToolFault
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.chat.answers import (
    CALL_WORDS,
    Answer,
    has_thought,
    read_json,
    split_thought,
    take_apart,
    without_thought,
)
from luthier.data.templates import CONTENT, Piece, Slot, Special, Template, Token
from luthier.data.tools import ToolSyntax
from luthier.data.types import Message

_PLACEHOLDER = re.compile(r"\{\{(content|idx)\}\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model is given, and its answer."""

    prompt: tuple[Piece, ...]
    answer: tuple[Piece, ...]


def render(
    template: Template,
    messages: tuple[Message, ...],
    *,
    system: str | None = None,
    tools: str = "",
    enable_thinking: bool | None = True,
    preserve_thinking: bool = False,
    purpose: Literal["train", "infer"],
    keep_past_thinking: bool = True,
    today: date | None = None,
) -> tuple[Turn, ...]:
    """The turns of a conversation: user or observation at even positions, assistant or function at odd ones.

    `train` gives one turn for each pair. `infer` gives exactly one turn: its prompt holds everything up to the last
    answer, which is empty if the conversation ends with a question.

    What the data give apart is written as data without keys for it have it: a thought stands in front of the answer,
    between the format's tags, and calls stand on a new line after the text, with all that the format puts before calls.
    `enable_thinking` False leaves such a thought out.

    All else about thinking matters for reasoning formats only. `enable_thinking`: with True, answers without a thought
    begin with an empty one, which is a target; with None, the empty one is part of the prompt; with False it is too,
    and thoughts are removed. Earlier answers lose their thoughts in `infer`, and in `train` without
    `keep_past_thinking`, unless `preserve_thinking` is set. `today` is for tool syntaxes with a date. Raises `RowError`
    for invalid calls or tools.
    """
    assert messages and (purpose == "infer" or len(messages) % 2 == 0), "a turn is a pair of messages"
    answers = [_in_one_text(template, message, enable_thinking) for message in messages[1::2]]
    pending = len(messages) % 2 == 1
    prompts = [list(_opening(template, messages[0], system, tools, today))]
    prompts += [list(_fill(_slot(template, m), m.content, i)) for i, m in enumerate(messages[2::2], start=1)]
    drop_past = not preserve_thinking and (purpose == "infer" or not keep_past_thinking)
    first_live = len(prompts) - 1 if purpose == "infer" or drop_past else 0
    leads: list[Slot] = [()] * len(prompts)
    if template.reasons:
        for i, answer in enumerate(answers):
            if (drop_past and i < len(prompts) - 1) or (enable_thinking is False and i >= first_live):
                answer.text = without_thought(answer.text, template.thinking_tags)
        for i in range(first_live, len(prompts)):
            if i == len(answers) or not has_thought(answers[i].text, template.thinking_tags):
                if enable_thinking:
                    leads[i] = (template.empty_thought,)
                else:
                    prompts[i].append(template.empty_thought)
    filled = [
        (*lead, *_filled(answer, template, i)) for i, (lead, answer) in enumerate(zip(leads, answers, strict=False))
    ]
    if purpose == "train":
        return tuple(Turn(tuple(prompt), answer) for prompt, answer in zip(prompts, filled, strict=True))
    last = () if pending else filled.pop()
    history = [piece for prompt, answer in zip(prompts, filled, strict=False) for piece in (*prompt, *answer)]
    return (Turn((*history, *prompts[-1]), last),)


def _in_one_text(template: Template, message: Message, enable_thinking: bool | None) -> Answer:
    """An answer with the thought that the data give apart in its text."""
    answer = take_apart(message, template.thinking_tags, (template.tool_call_words, CALL_WORDS))
    if message.calls and split_thought(answer.text, template.thinking_tags)[1]:
        answer.text += "\n"
    if message.thought and enable_thinking is not False:
        opening, closing = template.thinking_tags
        answer.text = opening + message.thought.strip("\n") + closing + answer.text.lstrip("\n")
    return answer


def as_text(pieces: tuple[Piece, ...], bos: str = "<BOS>", eos: str = "<EOS>") -> str:
    """Pieces as readable text, with the given words for the tokenizer's bos and eos."""
    own = {Special("bos"): bos, Special("eos"): eos}
    return "".join(
        piece if isinstance(piece, str) else piece.text if isinstance(piece, Token) else own[piece] for piece in pieces
    )


def _fill(slot: Slot, content: str, index: int) -> Slot:
    """The slot with its placeholders filled in, without empty pieces."""
    values = {"content": content, "idx": str(index)}
    filled = []
    for piece in _parts(slot):
        text = "".join([values.get(part, part[1:]) for part in piece]) if isinstance(piece, tuple) else piece
        if text != "":
            filled.append(text)
    return tuple(filled)


@lru_cache(maxsize=256)
def _parts(slot: Slot) -> tuple[Special | Token | tuple[str, ...], ...]:
    """Every text of a slot, split into names of placeholders and the text around them, which is prefixed by `=`.

    Cached, since the same few slots are filled for every message.
    """
    return tuple(
        tuple(part if i % 2 else f"={part}" for i, part in enumerate(_PLACEHOLDER.split(piece)))
        if isinstance(piece, str)
        else piece
        for piece in slot
    )


def _slot(template: Template, message: Message) -> Slot:
    return template.observation if message.role == "observation" else template.user


def _opening(template: Template, message: Message, system: str | None, tools: str, today: date | None) -> Slot:
    """Prefix, system text with the tools, and first message."""
    words = template.default_system if system is None else system
    if tools:
        described = _describe(template.tool_syntax, tools, today or date.today())
        words += described.lstrip("\n") if template.strips_tools and not words else described
    head = _head(template.system, words) if words else ()
    content = message.content
    if template.kind == "llama2":
        content, head = "".join(map(str, head)) + content, ()
    return (*template.prefix, *head, *_fill(_slot(template, message), content, 0))


@lru_cache(maxsize=256)
def _head(slot: Slot, words: str) -> Slot:
    """The slot of the system text. Cached, since the rows of a dataset often share it."""
    return _fill(slot, words, 0)


@lru_cache(maxsize=256)
def _describe(syntax: str, tools: str, today: date) -> str:
    """The description of the tools. Cached, since the rows of a dataset often share it."""
    try:
        listed = read_json(tools)
    except ValueError as error:
        raise ToolFault(f"the tools are not JSON: {error}") from error
    if not isinstance(listed, list):
        raise ToolFault(f"the tools are not a list but {type(listed).__name__}")
    try:
        return TOOL_SYNTAXES.get(syntax).describe(listed, today) if listed else ""
    except (AttributeError, KeyError, TypeError) as error:
        raise ToolFault(f"a tool is not an object with name and parameters: {error!r}") from error


def _filled(answer: Answer, template: Template, index: int) -> Slot:
    if not answer.calls:
        return _fill(template.assistant, answer.text, index)
    syntax: ToolSyntax = TOOL_SYNTAXES.get(template.call_syntax)
    gap = syntax.after_text if answer.text and not answer.text.endswith(syntax.after_text) else ""
    words, calls = answer.text + gap, syntax.write(answer.calls)
    opening, mark = _opening_of(template.assistant), _opening_of(template.call_slots)
    if not words or mark in (opening, ("",)):
        return _fill(template.call_slots, words + calls, index)
    # The mark that opens calls, such as [TOOL_CALLS], has nothing but calls after it.
    return (*_fill((*opening[:-1], f"{opening[-1]}{CONTENT}"), words, index), *_fill(template.call_slots, calls, index))


def _opening_of(slot: Slot) -> Slot:
    """The pieces of a slot before its content; the last one is the text of the same piece."""
    place = next(index for index, piece in enumerate(slot) if isinstance(piece, str) and CONTENT in piece)
    return (*slot[:place], str(slot[place]).partition(CONTENT)[0])
